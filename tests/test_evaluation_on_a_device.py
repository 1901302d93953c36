"""Estimates on a GPU: the host never waits for it within their loops, and takes as many images at once as memory holds."""

import contextlib
import functools

import pytest
import torch
from emulated_device import Move, emulated_gpu, on_gpu
from torch import nn
from torch.utils._pytree import tree_leaves

import vaelib
from vaelib import evaluation, heldout, priors
from vaelib.graphs import Watch

DIGITS = vaelib.load_images("digits")


class Waits(Watch):
    """Notes what makes the host wait for the emulated GPU: a read of a tensor there, a copy from one side to the other."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = len(self.found)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if not any(on_gpu(value) for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)):
            del self.found[before:]  # the host reads what is its own, as Adam does its count of steps
        return result


@contextlib.contextmanager
def waits(monkeypatch):
    apply = Move.apply

    def noted(value, gpu):
        watch.found.append("to the device" if gpu else "to the host")
        return apply(value, gpu)

    with emulated_gpu(), monkeypatch.context() as patch, Waits() as watch:
        patch.setattr(Move, "apply", noted)
        yield watch


class Wide:
    """A prior of one's own, N(0, 4 I) up to a constant, which draws on the CPU and has no noise to be annealed in."""

    def log_prob(self, z):
        return -z.square().sum(-1) / 8

    def sample(self, num, generator=None, temperature=1.0):
        return 2 * temperature * torch.randn(num, 2, generator=generator, device="cpu")


def model_of(name):
    torch.manual_seed(0)
    if name == "conditional":
        return vaelib.conditional_vae((1, 28, 28), 10, (8,), 2)
    if name == "hierarchical":
        return vaelib.hierarchical_vae((1, 28, 28), ((2, 1), (2, 1)), width=8, bottleneck=4, blocks=1)
    model = vaelib.mlp_vae((1, 28, 28), (8,), 2, {"name": "gaussian", "learned": True} if name == "gaussian" else "bernoulli")
    if name == "own prior":
        model.prior = Wide()
    return model


def refined(model, images, steps):
    return evaluation.refine_posterior(model, model.likelihood.observe(images.pixels.to(model.device)), steps, validate=False)


LOOPS = {  # each with its number of steps
    "importance samples": lambda model, images, steps: vaelib.log_likelihood(model, images, 3 * steps, sample_batch=3),
    "annealing": lambda model, images, steps: evaluation.annealed_log_likelihood(model, images, steps, 2, leapfrog_steps=2),
    "leapfrog steps": lambda model, images, steps: evaluation.annealed_log_likelihood(model, images, 1, 2, leapfrog_steps=steps),
    "refinement": refined,
    "proposals": lambda model, images, steps: evaluation.inference_gaps(model, images, 3 * steps, 2, sample_batch=3),
    "second stage": lambda model, images, steps: priors.fit_second_stage(model, DIGITS[: 100 * steps], (8,), 2),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "conditional", "hierarchical", "own prior"])
def test_a_step_of_each_loop_never_waits_for_the_device(name, loop, monkeypatch):
    if (name, loop) in (("hierarchical", "refinement"), ("hierarchical", "proposals"), ("hierarchical", "second stage")):
        pytest.skip("not for a hierarchical model")
    if name == "conditional" and loop == "refinement":
        pytest.skip("the model of each image's label is refined by inference_gaps")
    found = []
    for steps in (2, 5):
        with waits(monkeypatch) as watch:
            LOOPS[loop](model_of(name).to("cuda"), DIGITS[:4], steps)
        found.append(watch.found)
    assert found[0] == found[1]


def test_of_a_chunk_its_images_go_to_the_device_and_its_results_come_back(monkeypatch):
    gaps = functools.partial(evaluation.inference_gaps, steps=3)
    for function, results in ((vaelib.log_likelihood, 2), (gaps, 3)):
        found = []
        for chunks in (1, 2):
            model = model_of("bernoulli")
            with waits(monkeypatch) as watch:
                model.to("cuda")
                placed = len(watch.found)
                function(model, DIGITS.pixels[: 4 * chunks], 5, batch_size=4)
            found.append(watch.found[placed:])
        assert found[0] == ["to the device"] + results * ["to the host"]
        assert found[1] == 2 * found[0]


@contextlib.contextmanager
def memory(monkeypatch, free, of_an_image):
    """A GPU with so many bytes free, on which a chunk takes so many for each image; the sizes of the chunks."""
    sizes, observe = [], vaelib.Bernoulli.observe

    def observed(self, pixels, *args, **kwargs):
        sizes.append(len(pixels))
        return observe(self, pixels, *args, **kwargs)

    with emulated_gpu(), monkeypatch.context() as patch:
        patch.setattr(vaelib.Bernoulli, "observe", observed)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 10, 2**40))
        patch.setattr(torch.cuda, "memory_reserved", lambda device: 17)
        patch.setattr(torch.cuda, "memory_allocated", lambda device: 7)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 + of_an_image * sizes[-1])
        yield sizes


@pytest.mark.parametrize(
    ("free", "of_an_image", "expected"),
    [(6000, 100, [20, 30, 30, 20]), (1000, 100, [20] * 5), (2**40, 2**33 // 40, [20, 40, 40]), (2**40, 0, [20, 80])],
)
def test_chunks_grow_to_half_of_the_free_memory_and_the_estimate_stays(free, of_an_image, expected, monkeypatch):
    model, images = model_of("bernoulli"), DIGITS[:100]
    on_the_cpu = vaelib.log_likelihood(model, images, 10)
    with memory(monkeypatch, free, of_an_image) as sizes:
        found = vaelib.log_likelihood(model.to("cuda"), images, 10)
        assert sizes == expected
    torch.testing.assert_close(found, on_the_cpu)


def test_a_batch_size_that_was_given_is_kept_and_a_cpu_keeps_the_default(monkeypatch):
    model, images = model_of("bernoulli"), DIGITS[:45]
    with memory(monkeypatch, 2**40, 1) as sizes:
        vaelib.log_likelihood(model, images, 2)
        assert sizes == [20, 20, 5]
        sizes.clear()
        vaelib.log_likelihood(model.to("cuda"), images, 2, batch_size=20)
        assert sizes == [20, 20, 5]
    assert isinstance(evaluation.TWENTY, heldout.AtLeast)


def test_sums_are_float64_where_the_values_are():
    with emulated_gpu():
        values = nn.Parameter(torch.ones(3)).to("cuda")
        assert on_gpu(heldout.exact(values))
        assert heldout.exact(values).dtype == torch.float64
