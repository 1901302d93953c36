"""Retrieval: neighbours are the exact ones, ties included; distances, scores and files are what they are called."""

import json
import math
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score, precision_score, recall_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch.distributions import Independent, Normal, kl_divergence

import vaelib
from vaelib import cli, retrieval
from vaelib.data import image_set, load_folder, read_image
from vaelib.retrieval import (
    DISTANCES,
    LatentIndex,
    average_precision,
    bootstrap_interval,
    distance_between,
    knn_accuracy,
    nearest_neighbours,
    posteriors,
    precision_at_k,
    recall_at_k,
    score_retrieval,
)
from vaelib.vae import Posterior


def random_codes(count, width, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    mean, log_var = torch.randn(2, count, width, generator=generator, dtype=dtype)
    return Posterior(mean, 1.5 * log_var - 2)


def by_brute_force(q, x, k, distance):
    """Every distance in float64, rounded to float32, sorted by (distance, index)."""
    q, x = (Posterior(*(part.double() for part in codes)) for codes in (q, x))
    every = torch.stack([distance_between(Posterior(*(part[i] for part in q)), x, distance) for i in range(len(q.mean))]).float()
    order = every.argsort(dim=1, stable=True)[:, :k]
    return order, every.gather(1, order)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = vaelib.mlp_vae((1, 28, 28), (32,), 4)
    with torch.no_grad():
        made.encoder.head.weight.mul_(4)
    return made


@pytest.fixture(scope="module")
def index(model, digits):
    return LatentIndex.build(model, digits)


@pytest.mark.equation("symmetric-kl")
@pytest.mark.equation("bhattacharyya")
def test_statistical_distances_are_those_of_torch_distributions_and_of_the_integral():
    p, q = random_codes(6, 3, 1, torch.float64), random_codes(6, 3, 2, torch.float64)
    first, second = (Independent(Normal(c.mean, (c.log_var / 2).exp()), 1) for c in (p, q))
    both = kl_divergence(first, second) + kl_divergence(second, first)
    torch.testing.assert_close(distance_between(p, q, "symmetric_kl"), both, rtol=1e-12, atol=1e-12)
    grid = torch.linspace(-40, 40, 400001, dtype=torch.float64)[:, None, None]  # the integral of sqrt(p q) factors over the latents
    roots = (
        (Normal(p.mean, (p.log_var / 2).exp()).log_prob(grid) + Normal(q.mean, (q.log_var / 2).exp()).log_prob(grid)) / 2
    ).exp()
    integral = torch.trapezoid(roots, dx=80 / 400000, dim=0).prod(1)
    torch.testing.assert_close(distance_between(p, q, "bhattacharyya"), -integral.log(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", DISTANCES[2:])
def test_the_distance_of_nearly_equal_posteriors_is_never_below_zero(distance, dtype):
    change = torch.cat([torch.logspace(-20, 0.5, 500, dtype=dtype), -torch.logspace(-20, 0.5, 500, dtype=dtype)])[:, None]
    p, q = Posterior(torch.zeros_like(change), change), Posterior(torch.zeros_like(change), torch.zeros_like(change))
    found = distance_between(p, q, distance)
    assert (found >= 0).all()
    exact = change[:, 0].double() ** 2 * (1 / 2 if distance == "symmetric_kl" else 1 / 16)  # to first order
    near = change[:, 0].abs() < 1e-3
    torch.testing.assert_close(found[near].double(), exact[near], rtol=1e-5, atol=1e-40)


def test_every_distance_is_symmetric_and_zero_from_a_code_to_itself():
    p, q = random_codes(50, 7, 1, torch.float64), random_codes(50, 7, 2, torch.float64)
    for distance in DISTANCES:
        torch.testing.assert_close(distance_between(p, q, distance), distance_between(q, p, distance))
        assert distance_between(p, p, distance).abs().max() < 1e-14
        assert distance_between(p, q, distance).min() > 0


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("count", "width", "k", "block"), [(40, 3, 5, 7), (3000, 6, 10, 100), (30000, 2, 3, 500)])
def test_neighbours_are_those_of_brute_force_in_float64(distance, count, width, k, block):
    q, x = random_codes(12, width, 1), random_codes(count, width, 2)
    found = nearest_neighbours(q, x, k, distance, block)
    indices, distances = by_brute_force(q, x, k, distance)
    assert torch.equal(found.indices, indices)
    assert torch.equal(found.distances, distances)
    assert (found.indices.dtype, found.distances.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("distance", DISTANCES)
def test_ties_go_to_the_lower_index_also_at_the_last_neighbour(distance):
    few = random_codes(7, 5)
    x = Posterior(*(part[torch.arange(4000) % 7] for part in few))  # each code 571 times: every k cuts through a tie
    found = nearest_neighbours(few, x, 20, distance)
    expected = torch.arange(7)[:, None] + 7 * torch.arange(20)
    assert torch.equal(found.indices, expected)
    assert torch.equal(nearest_neighbours(few, x, 20, distance, block=2).indices, expected)


def test_a_few_equal_codes_among_many_stand_in_the_order_of_their_indices():
    q, x = random_codes(40, 3, 1), random_codes(2000, 3, 2)
    place = torch.randperm(6000, generator=torch.Generator().manual_seed(0)) % 2000
    x = Posterior(*(part[place] for part in x))  # each code three times, anywhere
    for distance in DISTANCES:
        found = nearest_neighbours(q, x, 12, distance)
        assert torch.equal(found.indices, by_brute_force(q, x, 12, distance)[0])
        order = found.indices.view(40, 4, 3)
        assert (place[order] == place[order[..., :1]]).all()
        assert (order.diff(dim=2) > 0).all()


def test_codes_far_from_the_origin_are_still_told_apart():
    x = 3000 + 0.01 * torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))  # |x|^2 has no digit left for distances
    q = x[:20] + 0.001
    tree = NearestNeighbors(algorithm="kd_tree").fit(x.double().numpy())
    distances, _ = tree.kneighbors(q.double().numpy(), 5)
    np.testing.assert_allclose(nearest_neighbours(q, x, 5).distances.numpy(), distances, rtol=1e-6)


def test_the_size_of_the_blocks_does_not_matter(monkeypatch):
    q, x = random_codes(30, 5, 1), random_codes(2000, 5, 2)
    for distance in DISTANCES:
        whole = nearest_neighbours(q, x, 7, distance)
        with monkeypatch.context() as patch:
            patch.setattr(vaelib.retrieval, "NUMBERS", 1000)
            for block in (1, 4, 100):
                part = nearest_neighbours(q, x, 7, distance, block)
                assert torch.equal(part.indices, whole.indices)
                assert torch.equal(part.distances, whole.distances)


def test_raw_pixels_need_no_more_candidates_than_codes_do(digits, monkeypatch):
    """The bound on the rounding grows with the numbers as the distances do: the few candidates that are taken first suffice."""
    widths, exact_distances = [], retrieval.exact_distances
    monkeypatch.setattr(retrieval, "exact_distances", lambda *given: widths.append(given[2].shape[1]) or exact_distances(*given))
    flat = digits.pixels.flatten(1).float()
    found = nearest_neighbours(flat[:50] / 3, flat, k=5)
    assert set(widths) == {5 + retrieval.SPARE}
    exact = torch.cdist(flat[:50].double() / 3, flat.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(found.indices, exact.float().argsort(dim=1, stable=True)[:, :5])


def test_all_codes_can_be_asked_for_and_come_in_order():
    q, x = random_codes(4, 3, 1), random_codes(90, 3, 2)
    found = nearest_neighbours(q.mean, x.mean, 90)
    assert torch.equal(found.indices.sort(1).values, torch.arange(90).expand(4, -1))
    assert (found.distances.diff(dim=1) >= 0).all()


def test_an_image_finds_itself_first(index, digits):
    found = index.search(digits.pixels[:200], k=3)
    itself = (found.indices == torch.arange(200)[:, None]).any(1)
    assert itself.all()
    assert found.distances[:, 0].max() < 1e-5
    for distance in DISTANCES:
        assert torch.equal(index.search(digits.pixels[40:60], 1, distance).indices[:, 0], torch.arange(40, 60))


def test_the_index_holds_posteriors_not_samples_whatever_the_chunks(index, model, digits):
    means = vaelib.posterior_means(model, digits)
    torch.testing.assert_close(index.codes.mean, means, rtol=1e-5, atol=1e-6)
    again = LatentIndex.build(model, digits, batch_size=77)
    torch.testing.assert_close(again.codes.mean, means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again.codes.log_var, index.codes.log_var, rtol=1e-5, atol=1e-6)
    assert torch.equal(LatentIndex.build(model, digits.pixels[:9]).labels, torch.full((9,), -1))


def test_search_takes_pixels_sets_posteriors_and_means_alike(index, digits):
    images = digits[5:15]
    q = posteriors(index.model, images)
    by_pixels = index.search(images.pixels, 4)
    for queries in (images, q, q.mean):
        assert torch.equal(index.search(queries, 4).indices, by_pixels.indices)
    assert not torch.equal(index.search(q, 4, "symmetric_kl").distances, by_pixels.distances)


def test_adding_images_is_building_with_all_of_them(index, model, digits):
    grown = LatentIndex.build(model, digits[:700])
    grown.add(digits[700:1500])
    assert len(grown) == len(index) == 1500
    assert torch.equal(grown.labels, digits.labels)
    torch.testing.assert_close(grown.codes.mean, index.codes.mean, rtol=1e-5, atol=1e-6)
    assert grown.label(0) == digits.classes[digits.labels[0]]
    for i in (-1, 1500):
        with pytest.raises(ValueError, match=f"i: got int {i}, expected the index of one of the 1500 images"):
            grown.label(i)


def test_an_index_says_where_its_images_are_only_while_that_holds(model, digits):
    source = {"data": "digits", "split": "train"}
    index = LatentIndex.build(model, digits[:20], source=source)
    assert index.source == source
    index.add(vaelib.load_images("digits", "test"))
    assert index.source == {}
    assert source == {"data": "digits", "split": "train"}


@pytest.mark.parametrize("build", [
    lambda: vaelib.conv_vae((3, 16, 16), (4, 4, 4), channels=(8, 8)),
    lambda: vaelib.hierarchical_vae((3, 16, 16), ((2, 1), (2, 1)), width=8, bottleneck=4, blocks=1),
    lambda: vaelib.mlp_vae((3, 16, 16), (16,), 5, "gaussian"),
])  # fmt: skip
def test_every_kind_of_model_can_be_searched_saved_and_loaded(build, tmp_path):
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8)
    made = LatentIndex.build(build(), image_set(pixels, list(range(30))))
    made.save(tmp_path / "a.index")
    loaded = LatentIndex.load(tmp_path / "a.index")
    for distance in DISTANCES:
        a, b = (each.search(pixels[:6], 5, distance) for each in (made, loaded))
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.indices[:, 0], torch.arange(6))


def test_a_saved_index_comes_back_whole_in_one_file(index, model, digits, tmp_path):
    named = LatentIndex.build(model, digits[:40], names=[f"{i}.png" for i in range(40)], source={"folder": "somewhere"})
    named.save(tmp_path / "new" / "digits.index")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["digits.index"]
    for loaded in (LatentIndex.load(tmp_path / "new" / "digits.index"), LatentIndex.load(tmp_path / "new" / "digits.index", model)):
        assert torch.equal(loaded.codes.mean, named.codes.mean)
        assert torch.equal(loaded.codes.log_var, named.codes.log_var)
        assert torch.equal(loaded.labels, named.labels)
        assert (loaded.names, loaded.classes, loaded.source) == (named.names, named.classes, named.source)
        found, expected = (each.search(digits.pixels[50:60], 3, "bhattacharyya") for each in (loaded, named))
        assert torch.equal(found.indices, expected.indices)
    loaded.add(digits[40:50], [f"{i}.png" for i in range(40, 50)])  # the file stays as it was until it is saved again
    assert len(LatentIndex.load(tmp_path / "new" / "digits.index")) == 40
    loaded.save(tmp_path / "new" / "digits.index")
    assert len(LatentIndex.load(tmp_path / "new" / "digits.index")) == 50


def test_an_index_of_another_model_is_refused(index, model, digits, tmp_path):
    index.save(tmp_path / "digits.index")
    other = vaelib.mlp_vae((1, 28, 28), (32,), 4)
    with pytest.raises(ValueError, match="model: got another config or other weights"):
        LatentIndex.load(tmp_path / "digits.index", other)
    own = LatentIndex.build(other, digits[:20])
    with torch.no_grad():
        other.encoder.head.bias.add_(1e-3)  # trained on since
    for call in (lambda: own.search(digits.pixels[:2], 1), lambda: own.add(digits[:2]), lambda: own.save(tmp_path / "b.index")):
        with pytest.raises(ValueError, match="model: got another config or other weights"):
            call()
    assert not (tmp_path / "b.index").exists()


def test_broken_and_foreign_files_are_refused(index, tmp_path):
    good = tmp_path / "good.index"
    index.save(good)
    data = good.read_bytes()
    with safe_open(good, "pt") as file:
        about, tensors = json.loads(file.metadata()["index"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (tmp_path / "truncated").write_bytes(data[:-100])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "pickle").write_bytes(b"\x80\x04" + data)
    save_file(tensors, tmp_path / "foreign")
    save_file(tensors, tmp_path / "version", {"index": json.dumps(about | {"version": 2})})
    save_file(tensors | {"labels": tensors["labels"][1:]}, tmp_path / "sizes", {"index": json.dumps(about)})
    save_file({n: t for n, t in tensors.items() if n != "names"}, tmp_path / "lacking", {"index": json.dumps(about)})
    weight = next(name for name in tensors if name.startswith("model."))
    save_file(tensors | {weight: tensors[weight] + 1}, tmp_path / "weights", {"index": json.dumps(about)})
    for name in ("truncated", "empty", "pickle", "foreign", "version", "sizes", "lacking", "missing"):
        with pytest.raises(ValueError, match=f"path: got .*{name}, expected an index written by LatentIndex.save"):
            LatentIndex.load(tmp_path / name)
    with pytest.raises(ValueError, match="it is of version 2, this vaelib reads 1"):
        LatentIndex.load(tmp_path / "version")
    with pytest.raises(ValueError, match="it has no index in it"):
        LatentIndex.load(tmp_path / "foreign")
    with pytest.raises(ValueError, match="it is a folder"):
        LatentIndex.load(tmp_path)
    with pytest.raises(ValueError, match="model: got another config or other weights"):
        LatentIndex.load(tmp_path / "weights")


def test_a_failed_save_leaves_nothing_and_keeps_the_old_file(index, tmp_path):
    (tmp_path / "folder.index").mkdir()
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "folder.index", tmp_path / "file" / "a.index"):
        with pytest.raises(ValueError, match="path: got"):
            index.save(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.index"]
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_search_of_a_loaded_index_holds_blocks_not_the_whole(tmp_path):
    index = LatentIndex.build(vaelib.mlp_vae((1, 4, 4), (4,), 64), torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
    count = 1_000_000
    index.codes = Posterior(torch.randn(count, 64), torch.zeros(1).expand(count, 64))
    index.labels = torch.full((count,), -1)
    index.save(tmp_path / "large.index")
    code = """
import sys, threading, time, torch
from vaelib.retrieval import LatentIndex
def own():  # MB of this process's own memory, without pages of the file, which the system can drop at any time
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
torch.set_num_threads(1)
torch.randn(300, 300) @ torch.randn(300, 300)
before, most, done = own(), 0.0, False
def watch():
    global most
    while not done:
        most = max(most, own())
        time.sleep(0.001)
watcher = threading.Thread(target=watch); watcher.start()
index = LatentIndex.load(sys.argv[1])
found = index.search(torch.zeros(20, 64), 10)
done = True; watcher.join()
print(most - before, found.distances.max().item(), len(index))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "large.index"], capture_output=True, text=True, check=True)
    most, furthest, found = map(float, done.stdout.split())
    norms = index.codes.mean.double().norm(dim=1)
    assert furthest == pytest.approx(norms.topk(10, largest=False).values[-1].item(), rel=1e-6)
    assert found == count
    assert most < 100  # of the 512 MB of codes


@pytest.mark.parametrize("method", ["hnsw", "ivf_pq"])
def test_faiss_methods_find_nearly_the_exact_neighbours_and_keep_through_a_file(method, model, digits, tmp_path):
    pytest.importorskip("faiss")
    exact = LatentIndex.build(model, digits).search(digits.pixels[:300], 10)
    index = LatentIndex.build(model, digits[:1000], method=method)
    index.add(digits[1000:])
    found = index.search(digits.pixels[:300], 10)
    shared = (found.indices[:, :, None] == exact.indices[:, None]).any(2).double().mean()
    assert shared > 0.95
    same = found.indices == exact.indices
    torch.testing.assert_close(found.distances[same], exact.distances[same], rtol=1e-4, atol=1e-5)  # true distances, not PQ's
    index.save(tmp_path / "a.index")
    again = LatentIndex.load(tmp_path / "a.index").search(digits.pixels[:300], 10)
    assert torch.equal(again.indices, found.indices)
    assert torch.equal(again.distances, found.distances)
    everything = index.search(digits.pixels[:3], 1500, effort=1)  # more than the lists that are looked into hold
    assert torch.equal(everything.indices.sort(1).values, torch.arange(1500).expand(3, -1))
    with pytest.raises(ValueError, match=f"distance: got 'cosine', expected 'euclidean' with the method '{method}'"):
        index.search(digits.pixels[:3], 10, "cosine")


def check_against_all_distances(index, q, k, share=1.0):
    """The distances found are those of the k nearest of all codes, but for a share of the queries; no image comes twice."""
    found = index.search(q, k)
    true = torch.cdist(q.double(), index.codes.mean.double()).sort(1).values[:, :k].float()
    assert ((found.distances - true).abs() < 1e-4).double().mean() >= share
    assert all(len(set(row)) == k for row in found.indices.tolist())
    far = (q[:, None] - index.codes.mean[found.indices]).norm(dim=2)
    torch.testing.assert_close(found.distances, far, rtol=1e-3, atol=1e-4)
    ties = found.distances[:, 1:] == found.distances[:, :-1]
    assert (found.indices[:, 1:] > found.indices[:, :-1])[ties].all()
    assert (found.distances[:, 1:] >= found.distances[:, :-1]).all()
    return found


@pytest.mark.parametrize(("method", "count", "copies", "share"), [
    ("hnsw", 100, 100, 0.99), ("hnsw", 500, 1500, 0.99), ("hnsw", 1, 50, 1), ("exact", 500, 1500, 1), ("ivf_pq", 500, 1500, 0.9),
])  # fmt: skip
def test_many_equal_codes_hide_no_others(method, count, copies, share, model, digits, tmp_path):
    if method != "exact":
        pytest.importorskip("faiss", reason="the approximate methods are FAISS's")
    blank = torch.zeros(copies, 1, 28, 28, dtype=torch.uint8)
    pixels = torch.cat([digits.pixels[:count], blank])[torch.randperm(count + copies, generator=torch.Generator().manual_seed(0))]
    index = LatentIndex.build(model, pixels, 10_000, method)
    assert len(index.codes.mean.unique(dim=0)) == count + 1
    q = torch.cat([index.codes.mean[:100], torch.randn(100, 4, generator=torch.Generator().manual_seed(1))])
    found = check_against_all_distances(index, q, 10, share)
    on_blank = index.search(blank[:1], 10).indices[0]
    assert torch.equal(on_blank, (pixels == 0).flatten(1).all(1).nonzero()[:10, 0])  # all at distance 0: the lowest indices
    everything = index.search(q[:3], count + copies)
    assert torch.equal(everything.indices.sort(1).values, torch.arange(count + copies).expand(3, -1))
    index.save(tmp_path / "a.index")
    again = LatentIndex.load(tmp_path / "a.index")
    assert torch.equal(again.search(q, 10).indices, found.indices)
    again.add(blank[:30])  # the same code once more, and new ones
    again.add(digits.pixels[600:700], batch_size=10_000)
    assert len(again) == count + copies + 130
    check_against_all_distances(again, torch.cat([q, again.codes.mean[-30:]]), 10, share)


def test_ivf_pq_counts_distinct_codes(model, digits):
    pytest.importorskip("faiss", reason="the approximate methods are FAISS's")
    with pytest.raises(ValueError, match="images: got 101, expected at least 256 with distinct codes"):
        LatentIndex.build(model, torch.cat([digits.pixels[:100], torch.zeros_like(digits.pixels[:400])]), method="ivf_pq")


@pytest.mark.equation("product-quantization")
def test_distances_of_ivf_pq_are_sums_over_pieces_to_the_nearest_centroids():
    faiss = pytest.importorskip("faiss", reason="the approximate methods are FAISS's")
    codes, queries = (random_codes(count, 8, seed).mean for count, seed in ((2000, 1), (5, 2)))
    structure, _ = retrieval.extended(None, "ivf_pq", codes)
    structure.nprobe = structure.nlist
    distances, hits = (torch.from_numpy(part) for part in structure.search(queries.numpy(), 20))
    centres = torch.from_numpy(structure.quantizer.reconstruct_n(0, structure.nlist))
    centroids = torch.from_numpy(faiss.vector_to_array(structure.pq.centroids)).reshape(structure.pq.M, 256, -1)
    lists = torch.cdist(codes, centres).argmin(1)
    rest = codes - centres[lists]
    of_pieces = (rest.unflatten(1, (structure.pq.M, -1))[:, :, None] - centroids).square().sum(3)  # (N, M, 256)
    names = of_pieces.argmin(2)
    assert structure.pq.M == 2
    for query, found, distance in zip(queries, hits, distances, strict=True):
        table = ((query - centres[lists[found]]).unflatten(1, (2, -1))[:, :, None] - centroids).square().sum(3)  # (20, M, 256)
        torch.testing.assert_close(table.gather(2, names[found][:, :, None]).sum((1, 2)), distance, rtol=1e-4, atol=1e-4)


def test_without_faiss_the_error_says_how_to_get_it(model, digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="pip install faiss-cpu"):
        LatentIndex.build(model, digits[:10], method="hnsw")


@pytest.fixture(scope="module")
def labelled():
    """Queries and a database of three classes that overlap, with labels."""
    generator = torch.Generator().manual_seed(3)
    labels, wanted = torch.randint(0, 3, (400,), generator=generator), torch.randint(0, 3, (60,), generator=generator)
    centres = torch.randn(3, 5, generator=generator)
    x, q = centres[labels] + torch.randn(400, 5, generator=generator), centres[wanted] + torch.randn(60, 5, generator=generator)
    return q, wanted, x, labels


@pytest.mark.equation("recall-at-k")
def test_scores_at_k_are_scikit_learn_s(labelled):
    q, wanted, x, labels = labelled
    near = nearest_neighbours(q, x, 9)
    found = labels[near.indices]
    retrieved = torch.zeros(60, 400).scatter(1, near.indices, 1)
    for i in range(60):
        truth = (labels == wanted[i]).int().numpy()
        assert precision_at_k(found, wanted)[i].item() == pytest.approx(precision_score(truth, retrieved[i].int().numpy()))
        assert recall_at_k(found, wanted, labels)[i].item() == pytest.approx(recall_score(truth, retrieved[i].int().numpy()))
    for k in (1, 5):
        predicted = KNeighborsClassifier(k).fit(x.numpy(), labels.numpy()).predict(q.numpy())
        votes = labels[near.indices[:, :k]]
        counts = torch.nn.functional.one_hot(votes, 3).sum(1)
        clear = (counts == counts.max(1, keepdim=True).values).sum(1) == 1  # it breaks ties by the lower class
        ours = knn_accuracy(votes, wanted)
        assert clear.sum() > 40
        assert torch.equal(ours[clear], torch.from_numpy(predicted == wanted.numpy()).double()[clear])


def test_a_tie_of_votes_goes_to_the_class_of_the_nearest():
    found = torch.tensor([[2, 1, 1, 2, 0], [1, 2, 2, 1, 0], [0, 1, 1, 2, 2], [0, 2, 1, 1, 2]])
    for winners, wanted in (([1, 1, 0, 0], [2, 1, 2, 1]), ([1, 1, 1, 1], [2, 1, 1, 2])):
        assert knn_accuracy(found, torch.tensor(wanted)).tolist() == winners


@pytest.mark.equation("average-precision")
@pytest.mark.parametrize("distance", DISTANCES)
def test_average_precision_over_the_full_ranking_is_scikit_learn_s(labelled, distance):
    _, wanted, _, labels = labelled
    q, x = random_codes(60, 4, 1), random_codes(400, 4, 2)
    q.mean[:, 0] += wanted
    x.mean[:, 0] += labels
    ours = average_precision(q, wanted, x, labels, distance, block=7)
    for i in range(60):
        far = distance_between(Posterior(q.mean[i].double(), q.log_var[i].double()), Posterior(*(p.double() for p in x)), distance)
        assert ours[i].item() == pytest.approx(average_precision_score((labels == wanted[i]).numpy(), -far.numpy()), abs=1e-9)


def test_the_bootstrap_interval_covers_the_mean_as_often_as_its_level():
    generator = torch.Generator().manual_seed(0)
    trials, covered = 400, 0
    for trial in range(trials):
        low, high = bootstrap_interval(torch.randn(80, generator=generator), 0.9, 400, seed=trial)
        covered += low <= 0 <= high
    assert abs(covered / trials - 0.9) < 4 * math.sqrt(0.9 * 0.1 / trials)
    values = torch.rand(50, generator=generator)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_score_retrieval_gives_mean_and_interval_of_each_score(labelled):
    q, wanted, x, labels = labelled
    found = labels[nearest_neighbours(q, x, 20).indices]
    ap = average_precision(q, wanted, x, labels)
    result = score_retrieval(found, wanted, labels, k=5, mean_average_precision=ap)
    assert set(result) == {"precision_at_k", "recall_at_k", "knn_accuracy", "mean_average_precision"}
    assert result["precision_at_k"]["mean"] == pytest.approx(precision_at_k(found[:, :5], wanted).mean().item())
    assert result["mean_average_precision"]["mean"] == pytest.approx(ap.mean().item())
    for score in result.values():
        assert score["low"] < score["mean"] < score["high"]


def test_bad_arguments_are_refused(index, model, digits):
    q, x = random_codes(3, 4, 1), random_codes(20, 4, 2)
    bad = x.mean.clone()
    bad[4, 1] = math.nan
    labels = torch.zeros(20, dtype=torch.int64)
    for call, message in [
        (lambda: LatentIndex.build(model, digits.pixels[:0]), "got an empty set"),
        (lambda: LatentIndex.build(model, digits.pixels[:, :, :14]), r"pixels: got images of shape \(1, 14, 28\), expected"),
        (lambda: LatentIndex.build(model, digits, method="flat"), "method: got 'flat', expected one of"),
        (lambda: LatentIndex.build(model, digits, names=["a"]), "names: got 1 for 1500 images"),
        (lambda: LatentIndex.build(model, digits[:100], method="ivf_pq"), "images: got 100, expected at least 256"),
        (lambda: index.add(digits[:3], ["a", "b", "c"]), "names: got 3 for 3 images"),
        (lambda: index.add(image_set(digits.pixels[:3], [0, 1, 2])), "images: got the classes"),
        (lambda: index.search(digits.pixels[:2], 1501), "k: got 1501, expected at most the 1500 images of the index"),
        (lambda: index.search(digits.pixels[:2], 0), "k: got int 0"),
        (lambda: index.search(digits.pixels[:2], 5, "euclidian"), "distance: got 'euclidian', .*did you mean 'euclidean'"),
        (lambda: index.search(digits.pixels[0], 5), "pixels: got a uint8 tensor"),
        (lambda: index.search(digits.pixels[:2].float(), 5), "pixels: got a float32 tensor"),
        (lambda: index.search(torch.zeros(2, 5), 5), r"queries: got a float32 tensor of shape \(2, 5\), expected shape \(Q, 4\)"),
        (lambda: index.search(torch.zeros(2, 4), 5, "symmetric_kl"), "queries: got NoneType None as log_var, expected posteriors"),
        (lambda: index.search(torch.full((2, 4), math.inf), 5), "queries: got NaN or infinity"),
        (lambda: nearest_neighbours(q.mean, bad, 2), "database: got NaN"),
        (lambda: nearest_neighbours(q, Posterior(x.mean, bad), 2, "bhattacharyya"), "database: got NaN"),
        (lambda: nearest_neighbours(q.mean, x.mean, 21), "k: got 21, expected at most the 20 codes"),
        (lambda: nearest_neighbours(q.mean, x.mean, 2, block=0), "block: got int 0"),
        (lambda: nearest_neighbours(q.mean, digits.pixels, 2), "database: got a uint8 tensor"),
        (lambda: recall_at_k(labels[None, :5], torch.tensor([3]), labels), "query_labels: got class 3"),
        (lambda: score_retrieval(labels[None, :5], labels[:1], labels, 6), "k: got 6, expected at most the 5 neighbours"),
        (lambda: bootstrap_interval(torch.ones(3), 1.0), "level: got 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert len(index) == 1500


@pytest.fixture
def pictures(tmp_path):
    """A folder of image files of several kinds, among them two that are none."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    colours = torch.arange(12 * 20 * 3).view(12, 20, 3).remainder(256).to(torch.uint8).numpy()
    Image.fromarray(colours).save(folder / "b.png")
    Image.fromarray(colours).save(folder / "deep" / "a.jpg")
    Image.fromarray(colours[..., 0]).save(folder / "c.gif")
    (folder / "broken.png").write_bytes((folder / "b.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_folder_gives_its_images_by_name_and_skips_what_is_none(pictures):
    for channels in (1, 3):
        folder = load_folder(pictures, (channels, 8, 8))
        assert folder.pixels.shape == (3, channels, 8, 8)
        assert folder.pixels.dtype == torch.uint8
        assert folder.names == ("b.png", "c.gif", "deep/a.jpg")
        assert list(folder.skipped) == ["broken.png", "notes.txt"]
        assert folder.skipped["notes.txt"] == "cannot identify image file"


LEVELS = np.linspace(0, 65535, 64).reshape(8, 8)


def write_levels(path, dtype, scale=1.0):
    values = (scale * LEVELS).astype(dtype)
    if path.suffix in (".pgm", ".ppm"):
        header = f"P{5 if path.suffix == '.pgm' else 6} 8 8 {int(65535 * scale)}\n".encode()
        path.write_bytes(header + np.repeat(values, 1 if path.suffix == ".pgm" else 3).tobytes())
    else:
        Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize(("name", "dtype", "scale"), [
    ("a.pgm", ">u2", 1), ("b.pgm", ">u2", 1023 / 65535), ("c.pgm", "u1", 255 / 65535), ("d.ppm", ">u2", 1), ("e.png", "u2", 1),
    ("f.tif", "u2", 1), ("g.png", "u1", 255 / 65535),
])  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_all_levels_of_8_and_16_bits_are_kept(name, dtype, scale, channels, tmp_path):
    pixels = read_image(write_levels(tmp_path / name, dtype, scale), (channels, 8, 8))
    expected = torch.from_numpy(LEVELS / 257).expand(channels, 8, 8)
    assert (pixels.double() - expected).abs().max() <= 1.5


@pytest.mark.parametrize(("name", "dtype", "scale", "kind"), [
    ("a.tif", "i4", 50, "32-bit integers"), ("b.tif", "f4", 1 / 65535, "floating-point numbers"),
    ("c.tif", "i4", 1 / 257, "32-bit integers"),
])  # fmt: skip
def test_levels_of_an_unknown_scale_are_refused_and_counted(name, dtype, scale, kind, pictures):
    file = write_levels(pictures / name, dtype, scale)
    message = f"its pixels are {kind} on a scale that is not known, expected 8 or 16 bits"
    with pytest.raises(ValueError, match=f"path: got .*{name}, expected an image file .{message}"):
        read_image(file, (1, 8, 8))
    assert load_folder(pictures, (1, 8, 8)).skipped[name] == message


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_are_followed_once_and_broken_ones_are_counted(pictures, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    for name in ("x.png", "deep/y.png"):
        (elsewhere / name).write_bytes((pictures / "b.png").read_bytes())
    for name, target in {
        "a-link": elsewhere, "another": elsewhere, "aloop": pictures, "deep/up": "..", "gone": tmp_path / "nowhere", "itself": "itself",
        "a-deep": "deep", "file.png": elsewhere / "x.png", ".hidden": elsewhere,
    }.items():  # fmt: skip
        (pictures / name).symlink_to(target)
    folder = load_folder(pictures, (1, 8, 8))
    assert folder.names == ("a-link/deep/y.png", "a-link/x.png", "b.png", "c.gif", "deep/a.jpg", "file.png")
    assert {name: reason for name, reason in folder.skipped.items() if "link" in reason} == {
        "another": "a link to a folder that was read before",
        "aloop": "a link to a folder that was read before",
        "deep/up": "a link to a folder that was read before",
        "a-deep": "a link to a folder that was read before",
        "gone": "a broken link",
        "itself": "a broken link",
    }
    assert {"broken.png", "notes.txt"} < set(folder.skipped)


def test_what_macos_adds_to_a_zip_file_is_left_out_like_hidden_files(pictures):
    before = load_folder(pictures, (1, 8, 8))
    (pictures / "__MACOSX" / "deep").mkdir(parents=True)
    for name in ("__MACOSX/b.png", "__MACOSX/deep/c.png", "__MACOSX/._b.png"):
        (pictures / name).write_bytes((pictures / "b.png").read_bytes())
    after = load_folder(pictures, (1, 8, 8))
    assert (after.names, after.skipped) == (before.names, before.skipped)


def test_hidden_files_and_folders_are_left_out_silently(pictures):
    before = load_folder(pictures, (1, 8, 8))
    (pictures / ".thumbnails").mkdir()
    for name in (".b.png", ".thumbnails/b.png"):
        (pictures / name).write_bytes((pictures / "b.png").read_bytes())
    (pictures / ".notes").write_text("no image")
    after = load_folder(pictures, (1, 8, 8))
    assert (after.names, after.skipped) == (before.names, before.skipped)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_what_is_transparent_in_a_file_is_white(mode, tmp_path):
    image, options = Image.new("RGBA", (8, 8), (0, 0, 0, 0)), {}  # black beneath
    image.paste((0, 0, 0, 255), (0, 0, 8, 4))
    if mode in ("P", "L"):
        image, options = Image.new(mode, (8, 8), 1), {"transparency": 1}
        image.paste(0, (0, 0, 8, 4))
        if mode == "P":
            image.putpalette([0, 0, 0] * 2)
    image.convert(mode).save(tmp_path / "a.png", **options)
    for channels in (1, 3):
        pixels = read_image(tmp_path / "a.png", (channels, 8, 8))
        assert (pixels[:, :4] == 0).all()
        assert (pixels[:, 4:] == 255).all()
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 51))
    image.save(tmp_path / "half.png")
    assert (read_image(tmp_path / "half.png", (1, 8, 8)) == 204).all()  # a fifth of black over white


def test_an_image_of_the_model_s_size_comes_as_it_is_stored(tmp_path, digits):
    Image.fromarray(digits.pixels[3, 0].numpy()).save(tmp_path / "digit.png")
    assert torch.equal(read_image(tmp_path / "digit.png", (1, 28, 28)), digits.pixels[3])
    shapes = vaelib.load_images("shapes", "test").pixels[0]
    Image.fromarray(shapes.permute(1, 2, 0).numpy()).save(tmp_path / "shape.png")
    assert torch.equal(read_image(tmp_path / "shape.png", (3, 32, 32)), shapes)
    deep = (digits.pixels[3, 0].numpy().astype(np.uint16) << 8) + 7  # 16 bits
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert torch.equal(read_image(tmp_path / "deep.png", (1, 28, 28)), digits.pixels[3])


def test_images_are_turned_upright_and_cropped_to_their_centre(tmp_path):
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 200  # the centre square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png", (1, 10, 10)) == 200).all()
    half = np.zeros((16, 16), np.uint8)
    half[:8] = 200  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: above is to become right
    Image.fromarray(half).save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png", (1, 16, 16))[0].int()
    assert (turned[:, 8:] == 200).all()
    assert (turned[:, :8] == 0).all()


def test_folders_and_files_without_an_image_are_refused(pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    for call, message in [
        (lambda: load_folder(tmp_path / "empty", (1, 8, 8)), "empty, expected a folder with an image that can be read; 0 cannot"),
        (lambda: load_folder(tmp_path / "texts", (1, 8, 8)), "1 cannot .*cannot identify image file"),
        (lambda: load_folder(tmp_path / "nowhere", (1, 8, 8)), "nowhere, expected a folder; there is none"),
        (lambda: load_folder(pictures / "notes.txt", (1, 8, 8)), "notes.txt, expected a folder; it is a file"),
        (lambda: load_folder(pictures, (2, 8, 8)), "image_shape: got 2 channels"),
        (lambda: load_folder(pictures, (1, 0, 8)), "image_shape"),
        (lambda: read_image(pictures / "notes.txt", (1, 8, 8)), "expected an image file"),
        (lambda: read_image(pictures / "none.png", (1, 8, 8)), "expected an image file"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


class Done(NamedTuple):
    status: int
    stdout: str
    stderr: str


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run `vaelib ...` in this process, in an empty folder: a process of its own would cost seconds each."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vaelib", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Done(ended.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def indexed(model, vaelib_command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    vaelib.save(model, folder / "run")
    done = vaelib_command(
        "index", folder / "run", "--data", "digits", "--out", folder / "digits.index", "--device", "cpu", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 1500
    return folder


def test_the_command_finds_what_the_library_finds_without_the_run_folder(indexed, index, digits, command, tmp_path):
    (tmp_path / "digits.index").write_bytes((indexed / "digits.index").read_bytes())
    Image.fromarray(digits.pixels[7, 0].numpy()).save(tmp_path / "query.png")
    done = command("search", "digits.index", "query.png", "-k", 3, "--out", "sheet.png", "--json", "--device", "cpu")
    assert done.status == 0, done.stderr
    rows = json.loads(done.stdout)["neighbours"]
    expected = index.search(digits.pixels[7:8], 3)
    assert [row["index"] for row in rows] == expected.indices[0].tolist()
    assert [row["distance"] for row in rows] == pytest.approx(expected.distances[0].tolist(), abs=1e-4)
    assert [row["label"] for row in rows] == [digits.classes[digits.labels[i]] for i in expected.indices[0]]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * 85 - 1, 84)  # each image of 28 pixels enlarged three times: at least 64
        picture = torch.from_numpy(np.array(sheet))
    for place, i in enumerate([7, *expected.indices[0].tolist()]):
        large = digits.pixels[i, 0].repeat_interleave(3, 0).repeat_interleave(3, 1)
        assert torch.equal(picture[:, place * 85 : place * 85 + 84], large)
    table = command("search", "digits.index", "query.png", "-k", 3, "--query-index", 5, "--device", "cpu")
    assert len(table.stdout.splitlines()) == 8
    with Image.open(tmp_path / "neighbours.png") as sheet:
        assert sheet.size == (4 * 85 - 1, 2 * 85 - 1)
    assert "digits test 5" in table.stdout


def test_a_folder_of_files_is_indexed_and_searched_by_name(indexed, digits, command, tmp_path):
    (tmp_path / "files").mkdir()
    for i in range(12):
        Image.fromarray(digits.pixels[i, 0].numpy()).save(tmp_path / "files" / f"{i:02}.png")
    (tmp_path / "files" / "broken.png").write_bytes(b"no image")
    done = command("index", indexed / "run", "--folder", "files", "--out", "a.index", "--device", "cpu", "--json")
    assert done.status == 0, done.stderr
    assert (json.loads(done.stdout)["images"], json.loads(done.stdout)["skipped"]) == (12, 1)
    assert json.loads(done.stdout)["skipped_files"] == ["broken.png"]
    assert done.stderr == "vaelib: skipped 1 file: broken.png (cannot identify image file)\n"
    options = ("--distance", "symmetric_kl", "-k", 1, "--device", "cpu", "--json", "--out", "sheet.png")
    done = command("search", "a.index", "files", *options)
    assert done.status == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["skipped"], result["skipped_files"]) == (1, ["files/broken.png"])
    assert [row["file"] for row in result["neighbours"]] == [f"{i:02}.png" for i in range(12)]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 85 - 1, 12 * 85 - 1)
    for name in ("x.txt", "y.txt", "z.txt"):
        (tmp_path / "files" / name).write_text("no image")
    done = command("search", "a.index", "files", *options)
    assert len(json.loads(done.stdout)["skipped_files"]) == 4
    reason = "(cannot identify image file)"
    assert done.stderr == f"vaelib: skipped 4 files: files/broken.png {reason}, files/x.txt {reason}, files/y.txt {reason}, ...\n"


@pytest.fixture
def few(model, digits, tmp_path):
    """Five digits as files in the folder "files", and an index of them."""
    (tmp_path / "files").mkdir()
    for i in range(5):
        Image.fromarray(digits.pixels[i, 0].numpy()).save(tmp_path / "files" / f"{i}.png")
    index = LatentIndex.build(model, load_folder(tmp_path / "files", (1, 28, 28)))
    index.source = {"folder": str(tmp_path / "files")}
    return index


def test_a_small_index_gives_all_its_images_where_no_number_is_asked_for(few, command):
    few.save("few.index")
    result = json.loads(command("search", "few.index", "files/0.png", "--device", "cpu", "--json").stdout)
    assert result["k"] == len(result["neighbours"]) == 5
    assert "k: got 6, expected at most the 5 images" in command("search", "few.index", "files/0.png", "-k", 6).stderr


def test_a_search_answers_also_where_no_picture_can_be_made(few, command, digits, tmp_path):
    known = {"data": "digits", "split": "train"}  # 1500 images, not 5
    Image.fromarray(digits.pixels[0, 0].numpy()).save("query.png")
    for source in ({}, known, {"folder": str(tmp_path / "moved")}, {"data": "lost", "split": "train"}):
        few.source = source
        few.save("few.index")
        done = command("search", "few.index", "query.png", "--device", "cpu", "--json")
        assert done.status == 0
        assert json.loads(done.stdout)["out"] is None
        assert json.loads(done.stdout)["neighbours"][0]["index"] == 0
        assert done.stderr.startswith("vaelib: no picture is made: ")
        assert len(done.stderr.splitlines()) == 1
        table = command("search", "few.index", "query.png", "--device", "cpu").stdout
        assert len(table.splitlines()) == 6
        assert "picture" not in table
    assert not (tmp_path / "neighbours.png").exists()


def test_an_index_that_grew_after_its_source_was_named_can_be_searched(model, digits, command):
    index = LatentIndex.build(model, digits, source={"data": "digits", "split": "train"})
    test = vaelib.load_images("digits", "test")
    index.add(test)
    index.save("grown.index")
    Image.fromarray(test.pixels[3, 0].numpy()).save("query.png")
    done = command("search", "grown.index", "query.png", "-k", 1, "--device", "cpu", "--json")
    assert done.status == 0
    assert json.loads(done.stdout)["neighbours"][0]["index"] == 1503


def test_a_missing_file_is_white_in_the_picture(few, command, tmp_path, digits):
    few.save("few.index")
    (tmp_path / "files" / "0.png").rename(tmp_path / "query.png")
    done = command("search", "few.index", "query.png", "-k", 2, "--device", "cpu", "--out", "sheet.png")
    assert done.status == 0
    assert done.stderr == "vaelib: white in the picture: 1 file that cannot be read\n"
    with Image.open(tmp_path / "sheet.png") as sheet:
        picture = np.array(sheet)
    assert (picture[::3, :84:3] == digits.pixels[0, 0].numpy()).all()
    assert (picture[:, 85:169] == 255).all()
    assert (picture[:, 170:] < 128).any()


def test_no_picture_is_written_over_an_input(few, command, tmp_path):
    few.save("few.png")  # an index may be called anything
    (tmp_path / "query.png").write_bytes((tmp_path / "files" / "0.png").read_bytes())
    (tmp_path / "link.png").symlink_to("query.png")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.png")}
    for query, out in [("query.png", "query.png"), ("query.png", "files/../query.png"), ("query.png", "link.png"),
                       ("query.png", "few.png"), ("query.png", "files/3.png"), ("files", "files/0.png")]:  # fmt: skip
        done = command("search", "few.png", query, "-k", 2, "--out", out, "--device", "cpu")
        assert done.status == 2
        assert "which is an input, expected another file" in done.stderr
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.png")} == before


def test_an_index_is_replaced_only_when_asked(indexed, command, tmp_path):
    arguments = ("index", indexed / "run", "--data", "digits", "--out", "a.index", "--device", "cpu")
    assert command(*arguments, "--split", "test").status == 0
    before = (tmp_path / "a.index").read_bytes()
    assert "already exists" in command(*arguments).stderr
    for precious in (b"precious", (indexed / "run" / "model.safetensors").read_bytes()):
        (tmp_path / "file").write_bytes(precious)
        assert "file is no index, expected a new file" in command(*arguments, "--out", "file", "--overwrite").stderr
        assert (tmp_path / "file").read_bytes() == precious
    assert (tmp_path / "a.index").read_bytes() == before
    assert command(*arguments, "--overwrite").status == 0
    assert len(LatentIndex.load(tmp_path / "a.index")) == 1500


@pytest.mark.parametrize(("arguments", "message"), [
    (("index", "{run}", "--data", "digits", "--out", "{tmp}/file"), "already exists"),
    (("index", "{run}", "--data", "digits", "--out", "{tmp}/file/a.index"), "got"),
    (("index", "{run}", "--data", "digits", "--out", "{tmp}/new.index", "--method", "lsh"), "method: got 'lsh'"),
    (("index", "{run}", "--data", "shapes", "--out", "{tmp}/new.index"), "got images of shape (3, 32, 32), expected (1, 28, 28)"),
    (("index", "{run}", "--folder", "{tmp}", "--out", "{tmp}/new.index"), "expected a folder with an image that can be read"),
    (("index", "{run}", "--folder", "{tmp}", "--split", "test", "--out", "{tmp}/new.index"), "folder: got it beside --split"),
    (("index", "{run}", "--folder", "{tmp}/file", "--out", "{tmp}/new.index"), "file, expected a folder; it is a file"),
    (("search", "{run}", "{tmp}/file"), "(it is a folder)"),
    (("search", "{run}/model.safetensors", "{tmp}/file"), "(it has no index in it)"),
    (("search", "{index}", "{tmp}/file"), "expected an image file"),
    (("search", "{index}"), "queries: got none"),
    (("search", "{index}", "--query-index", "297"), "query_index: got 297, expected less than the 297 test images"),
    (("search", "{index}", "--query-index", "1", "-k", "1501"), "k: got 1501, expected at most the 1500 images"),
    (("search", "{index}", "--query-index", "1", "--distance", "cosin"), "did you mean 'cosine'"),
    (("search", "{index}", "--query-index", "1", "--out", "{tmp}/a.txt"), "expected the name of an image file"),
    (("search", "{tmp}/file", "--query-index", "1"), "expected an index written by LatentIndex.save"),
])  # fmt: skip
def test_bad_input_ends_with_one_line_and_writes_nothing(arguments, message, indexed, command, tmp_path):
    (tmp_path / "file").write_text("precious")
    places = {"tmp": tmp_path, "run": indexed / "run", "index": indexed / "digits.index"}
    done = command(*(a.format(**places) for a in arguments))
    assert done.status == 2
    assert done.stderr.startswith("vaelib: error: ")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.real_data
def test_neighbours_of_a_digit_are_mostly_its_own_class(real_data, model):
    train, test = real_data("mnist"), real_data("mnist", "test")
    q, x = (images.pixels[:1000].flatten(1).float() for images in (test, train))
    found = train.labels[:1000][nearest_neighbours(q, x, 5).indices]
    assert knn_accuracy(found, test.labels[:1000]).mean() > 0.8


def test_a_query_that_found_its_k_is_not_searched_again(model, digits, monkeypatch):
    pytest.importorskip("faiss", reason="the approximate methods are FAISS's")
    index = LatentIndex.build(model, digits, method="ivf_pq")
    lists = len(index) / index.structure.nlist
    assert lists < 100  # a list has fewer codes than the 100 candidates that are wanted for k = 10, and more than 2
    exact = nearest_neighbours(index.codes.mean[:200], index.codes.mean, 2).indices
    searched = []
    monkeypatch.setattr(
        "vaelib.retrieval.nearest_neighbours", lambda q, x, k: searched.append(len(q)) or nearest_neighbours(q, x, k)
    )
    found = index.search(index.codes.mean[:200], k=2, effort=1)
    assert sum(searched) <= 20
    assert (found.indices == exact).double().mean() > 0.5  # what one list has
    assert index.search(index.codes.mean[:3], k=len(index), effort=1).indices.shape == (3, len(index))
    assert sum(searched) >= 3  # nobody has that many in one list


def test_a_file_whose_structure_has_every_code_is_read(model, digits, tmp_path):
    pytest.importorskip("faiss", reason="the approximate methods are FAISS's")
    index = LatentIndex.build(model, digits.pixels[:300], method="hnsw")
    index.save(tmp_path / "index")
    tensors, about = load_file(tmp_path / "index"), safe_open(tmp_path / "index", "pt").metadata()
    save_file({name: value for name, value in tensors.items() if name not in ("rows", "starts")}, tmp_path / "old", about)
    for part, same in zip(
        LatentIndex.load(tmp_path / "old").search(digits.pixels[:9], 5), index.search(digits.pixels[:9], 5), strict=True
    ):
        assert torch.equal(part, same)
