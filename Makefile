# Two commands: `make book` renders the chapters, `make test` proves them. Each sets up all that it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Small models run faster on one thread than on two that spin.
ONE_THREAD := OMP_NUM_THREADS=1
# Tests are handed out in the order of their files, which share what they set up; who is done takes over half of another's rest.
EVERY_CORE := --numprocesses auto --dist worksteal
# The cells of a notebook stay together.
EVERY_NOTEBOOK := --numprocesses auto --dist loadfile
# The numbered part of the contents; `make execute CHAPTERS=book/elbo.ipynb` takes one.
CHAPTERS := $(shell sed -n '/numbered: true/,/caption:/s|.*file: \(.*\)|book/\1.ipynb|p' book/_toc.yml)
CHAPTERS_STRICT := $(filter book/elbo.ipynb,$(CHAPTERS))
CHAPTERS_LAX := $(filter-out $(CHAPTERS_STRICT),$(CHAPTERS))

# Tests of the rendered pages and of what runs in a browser.
PAGES := $(foreach name,built_book web front print notebooks widgets drawing_board,tests/test_$(name).py)

# How long `make gpu` may take.
GPU_MINUTES ?= 12

RENDER = $(BIN)/jupyter-book build book --config _config.yml --path-output . -W -n --keep-going --quiet

# What pins the versions; `make setup CONSTRAINTS=` takes the newest.
CONSTRAINTS = --constraint constraints.txt

.PHONY: help pdf slides lighthouse colab-check dist links test-devices matrix notebooks assignment rows mnist-rows retrieval-rows gan-rows vq-rows uses-rows gpu features setup test test-unit test-notebooks test-strict test-lax test-real test-book book book-sphinx execute equations mutants lint benchmark clean diffusion-rows factors-rows

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## what all the others need, in .venv

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[book,test]" $(CONSTRAINTS)
	touch $(READY)

test: test-unit test-notebooks ## unit tests and every notebook, fast tier, no network

test-unit: $(READY) ## the first half of it
	$(ONE_THREAD) $(BIN)/python -m pytest tests -m "not real_data" $(EVERY_CORE) $(addprefix --ignore=,$(PAGES))

# Beside each other: the strict ones are few, and one process.
test-notebooks: $(READY) ## the second half
	@$(MAKE) --no-print-directory --jobs 2 test-strict test-lax

test-strict test-lax: export VAELIB_FAST = 1

test-strict: $(READY) ## notebooks whose outputs are compared word for word
	$(if $(CHAPTERS_STRICT),$(ONE_THREAD) $(BIN)/python -m pytest --nbval --nbval-current-env $(CHAPTERS_STRICT))

test-lax: $(READY) ## notebooks that have to run
	$(if $(CHAPTERS_LAX),$(ONE_THREAD) $(BIN)/python -m pytest --nbval-lax --nbval-current-env $(CHAPTERS_LAX) $(EVERY_NOTEBOOK))

test-real: $(READY) ## tests on the real data sets in $VAELIB_DATA
	$(ONE_THREAD) $(BIN)/python -m pytest tests -m real_data $(EVERY_CORE)

book: $(READY) ## render the book to _build/html/index.html
	$(RENDER)
	@$(MAKE) --no-print-directory notebooks
	@echo "The book: _build/html/index.html"

notebooks: $(READY) ## the chapters in plain Markdown, for Colab and Jupyter, in _build/notebooks; the pages offer them
	$(RENDER) --builder custom --custom-builder notebooks
	test ! -d _build/html/_sources || cp _build/notebooks/*.ipynb _build/html/_sources

book-sphinx: $(READY) ## the same pages by plain sphinx-build, in _build/sphinx/html
	mkdir -p _build/sphinx
	cp _config.yml _build/sphinx
	ln -sfn ../../book/_static ../../book/_vendor ../../book/references.bib _build/sphinx
	$(BIN)/jupyter-book config sphinx book --config _build/sphinx/_config.yml
	PYTHONPATH=book/_ext $(BIN)/sphinx-build -W -n --keep-going -q -c _build/sphinx book _build/sphinx/html

pdf: book ## the book as one PDF, _build/vae-book.pdf (needs Chromium)
	$(BIN)/python book/_scripts/pdf.py

slides: book ## slides for teaching, a deck for each chapter, in _build/slides
	$(BIN)/python book/_scripts/slides.py

test-book: $(READY) ## tests on the rendered pages and notebooks, and of figures in a browser
	$(ONE_THREAD) $(BIN)/python -m pytest $(PAGES) -m "not real_data" $(EVERY_CORE)

test-devices: $(READY) ## run each chapter on an emulated GPU (no CUDA; some minutes)
	VAELIB_FAST=1 $(ONE_THREAD) $(BIN)/python tests/emulated_device.py $(CHAPTERS)

lighthouse: $(READY) ## score the built pages, desktop and phone (needs npx; 20 minutes)
	VAELIB_RESULTS=results $(BIN)/python benchmarks/lighthouse.py

execute: $(READY) ## re-run the notebooks on real data and store their outputs and results
	$(BIN)/python book/_scripts/execute.py $(CHAPTERS)
	$(BIN)/python book/_scripts/ran_on.py

rows: $(READY) ## train and score the rows of the CIFAR tables that are missing
	$(BIN)/python book/_scripts/rows.py

mnist-rows: $(READY) ## the same for the MNIST tables, three trainings each
	$(BIN)/python book/_scripts/mnist_rows.py

retrieval-rows: $(READY) ## the same for the retrieval tables
	$(BIN)/python book/_scripts/retrieval_rows.py

gpu: $(READY) ## what waits for a GPU: tests, benchmark, missing rows, in GPU_MINUTES=12; goes on where it was cut
	$(BIN)/python book/_scripts/gpu.py --minutes $(GPU_MINUTES)

assignment: $(READY) ## write the students' notebooks of the four assignments from their sources
	$(BIN)/python book/_scripts/assignment.py

gan-rows: $(READY) ## the GAN and the second stages of the chapter on generation
	$(BIN)/python book/_scripts/gan_rows.py

vq-rows: $(READY) ## codes and learned priors of the chapter `codes`, on a GPU where there is one
	$(BIN)/python book/_scripts/vq_rows.py

factors-rows: $(READY) ## the codes whose factors the chapter `uses` looks for
	$(ONE_THREAD) $(BIN)/python book/_scripts/factors_rows.py

diffusion-rows: $(READY) ## priors by diffusion on the codes of MNIST; with DIFFUSION=--gpu the rows for a GPU
	$(ONE_THREAD) $(BIN)/python book/_scripts/diffusion_rows.py $(DIFFUSION)

uses-rows: $(READY) ## hidden pixels, left-out digits and predictive checks of the chapter `uses`, three trainings each
	$(ONE_THREAD) $(BIN)/python book/_scripts/uses_rows.py

features: $(READY) ## train the small classifier whose features score samples
	$(BIN)/python book/_scripts/features.py

equations: $(READY) ## table: labelled equation -> function -> test
	$(BIN)/python book/_scripts/equations.py

mutants: $(READY) ## break the loss in every way; list what no test notices
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[mutants]" --constraint constraints.txt
	$(BIN)/python tests/mutants.py

benchmark: $(READY) ## images per second of the trainer, beside the usual ways
	$(BIN)/python benchmarks/train_throughput.py

lint: $(READY) ## ruff, its formatter and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

matrix: ## unit tests on each Python that is here, with the oldest and the newest dependencies (hours; GBs in a temporary folder)
	$(PYTHON) tests/matrix.py

colab-check: notebooks ## each chapter installs vaelib and runs as on Colab
	$(BIN)/python book/_scripts/colab_check.py

links: $(READY) ## check the book's links (needs the network)
	$(BIN)/jupyter-book build book --config _config.yml --path-output _build/links --builder linkcheck

dist: $(READY) ## build and check the wheel and the source archive
	$(BIN)/python -m pip install --quiet --disable-pip-version-check twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean: ## remove what was built
	rm -rf _build build dist mutants .pytest_cache .mypy_cache
