"""Search by content: an index of latent codes, nearest neighbours under four distances, and scores of what was found."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import normalize

from vaelib._validation import as_path, check_choice, check_int, check_number, check_seed, describe
from vaelib.conditional import ConditionalVAE
from vaelib.data import ImageSet
from vaelib.densities import Posterior
from vaelib.evaluation import posteriors
from vaelib.storage import atomic, build, signature, writable_folder, write_tensors
from vaelib.vae import VAE

DISTANCES = ("euclidean", "cosine", "symmetric_kl", "bhattacharyya")
STATISTICAL = DISTANCES[2:]  # between posteriors; the others are between their means
METHODS = ("exact", "hnsw", "ivf_pq")
INDEX_VERSION = 1  # of the index file
SPARE = 8  # candidates beyond k whose distance is computed exactly
NUMBERS = 2**23  # scores in memory at once: 32 MiB
GROUP = 32  # scores of which one minimum is taken


class Neighbours(NamedTuple):
    """The k nearest of each query, nearest first: `indices` int64 and `distances` float32, each (Q, k), on the CPU."""

    indices: Tensor
    distances: Tensor


def distance_between(p: Posterior, q: Posterior, distance: str) -> Tensor:
    """The distance of diagonal Gaussians, or of their means, over the last axis; the other axes broadcast.

    - ``"euclidean"``: the norm of the means' difference.
    - ``"cosine"``: 1 - cos of the angle between the means; 1 where a mean is 0.
    - ``"symmetric_kl"``: KL(p, q) + KL(q, p), not halved, nats. Jeffreys 1946. eq. symmetric-kl
    - ``"bhattacharyya"``: -log of the integral of sqrt(p q), nats. Kailath 1967. eq. bhattacharyya
    """
    if check_choice("distance", distance, DISTANCES) == "euclidean":
        return (p.mean - q.mean).square().sum(-1).sqrt()
    if distance == "cosine":
        return (1 - (normalize(p.mean, dim=-1) * normalize(q.mean, dim=-1)).sum(-1)).clamp(min=0)
    squared, change = (p.mean - q.mean).square(), (p.log_var - q.log_var) / 2
    if distance == "symmetric_kl":
        return (2 * change.sinh().square() + squared * ((-p.log_var).exp() + (-q.log_var).exp()) / 2).sum(-1)
    large = torch.logaddexp(change, -change) - math.log(2)
    log_cosh = torch.where(change.abs() < 1, (2 * (change / 2).sinh().square()).log1p(), large)  # near 0 `large` loses its digits
    return (squared / (p.log_var.exp() + q.log_var.exp()) / 4 + log_cosh / 2).sum(-1)


def nearest_neighbours(
    queries: Tensor | Posterior, database: Tensor | Posterior, k: int = 10, distance: str = "euclidean", block: int = 100
) -> Neighbours:
    """The k nearest of the database for each query, exactly; ties go to the lower index.

    Matrix products find candidates of each query, where the database is; their distances are then computed in float64, rounded to
    float32 and sorted by (distance, index). Candidates are all that could be among the k nearest by a bound on the products' rounding.

    Args:
        queries: (Q, L), or a `Posterior` of that shape; the statistical distances need posteriors.
        database: (N, L), or a `Posterior`.
        k: neighbours per query, at most N.
        distance: see `distance_between`.
        block: queries at a time, at most; fewer where their distances to all codes would take much memory.

    Raises:
        ValueError: For codes of another shape, NaN or infinity among them, an unknown distance, or k above N.
    """
    q, x = check_pair(queries, database, distance)
    if check_int("k", k) > len(x.mean):
        raise ValueError(f"k: got {k}, expected at most the {len(x.mean)} codes there are")
    side = database_side(x, distance)
    found = [nearest_of_few(at(q, rows), x, side, k, distance) for rows in blocks(q, x, distance, block)]
    return Neighbours(*(torch.cat(part) for part in zip(*found, strict=True)))


def nearest_of_few(q: Posterior, x: Posterior, side: DatabaseSide, k: int, distance: str) -> Neighbours:
    """`nearest_neighbours` of queries whose scores (B, N) fit into memory."""
    phi, offset = query_side(q, distance)
    values = scores(phi, side, distance)  # (B, N)
    least, columns = smallest(values, min(k + SPARE, len(x.mean)))
    # of a sum of D products: at most D eps, and 8 sqrt(D) eps but for chances below 1e-13 (Higham and Mary 2019)
    coarse = values.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    rounding = min(phi.shape[1] + 5, 8 * math.sqrt(phi.shape[1] + 1)) * (2**-8 if coarse else torch.finfo(values.dtype).eps)
    error = rounding * ((1 + phi.norm(dim=1)) * (1 + side.norm) + side.most)
    furthest = least[:, k - 1]
    limit = furthest + 2 * error + 2**-21 * (furthest + offset.to(furthest)).abs()  # distances that round to one number are a tie
    if (least[:, -1] <= limit).any():  # more candidates than were taken, many equal codes perhaps
        columns = values.topk(int((values <= limit[:, None]).sum(1).max()), largest=False).indices
    columns = columns.cpu().sort(1).values  # so that a stable sort leaves ties in the order of their indices
    step = max(1, NUMBERS // (columns.shape[1] * x.mean.shape[1]))
    parts = [slice(start, start + step) for start in range(0, len(columns), step)]
    distances = torch.cat([exact_distances(at(q, rows), x, columns[rows], distance) for rows in parts])
    order = distances.argsort(dim=1, stable=True)[:, :k]
    return Neighbours(columns.gather(1, order), distances.gather(1, order))


def smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row and their columns, (B, N) -> (B, k) twice: `topk`, but one that looks at each number only once.

    They lie in the k groups of columns whose minima are the smallest, so that `topk` has to order few numbers.
    """
    groups = values.shape[1] // GROUP
    if groups < 4 * k:
        return tuple(values.topk(k, largest=False))  # type: ignore[return-value]
    every = torch.arange(values.shape[1], device=values.device)
    inside, rest = every[: groups * GROUP].view(groups, GROUP), every[groups * GROUP :].expand(len(values), -1)
    minima = values[:, : groups * GROUP].unflatten(1, (groups, GROUP)).amin(2)  # (B, groups)
    columns = torch.cat([inside[minima.topk(k, largest=False).indices].flatten(1), rest], 1)  # (B, about k * GROUP)
    least, places = values.gather(1, columns).topk(k, largest=False)
    return least, columns.gather(1, places)


def blocks(q: Posterior, x: Posterior, distance: str, block: int) -> list[slice]:
    """Slices of the queries, so that few numbers are in memory at once."""
    # a product reads the whole database, for 16 queries in hardly more time than for one
    most = NUMBERS // x.mean.numel() if distance == "bhattacharyya" else max(16, NUMBERS // len(x.mean))
    step = max(1, min(check_int("block", block), most))
    return [slice(start, start + step) for start in range(0, len(q.mean), step)]


def check_pair(queries: Tensor | Posterior, database: Tensor | Posterior, distance: str) -> tuple[Posterior, Posterior]:
    """Both as (mean, log_var) on the database's device; log_var is None for the distances between means."""
    check_choice("distance", distance, DISTANCES)
    pair = []
    for argument, value in (("queries", queries), ("database", database)):
        mean, log_var = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
        if not isinstance(mean, Tensor) or not mean.is_floating_point() or mean.dim() != 2 or mean.numel() == 0:
            raise ValueError(f"{argument}: got {describe(mean)}, expected a floating-point tensor (N, L), N and L at least 1")
        if distance in STATISTICAL and (not isinstance(log_var, Tensor) or log_var.shape != mean.shape):
            raise ValueError(f"{argument}: got {describe(log_var)} as log_var, expected posteriors for the distance {distance!r}")
        pair.append(Posterior(mean, log_var if distance in STATISTICAL else None))  # type: ignore[arg-type]
    (q, x), device = pair, pair[1].mean.device
    if q.mean.shape[1] != x.mean.shape[1]:
        raise ValueError(f"queries: got {describe(q.mean)}, expected shape (Q, {x.mean.shape[1]}) as the database has")
    if not all(part.isfinite().all() for part in q if part is not None):
        raise ValueError("queries: got NaN or infinity, expected finite numbers")
    return Posterior(*(None if part is None else part.to(device) for part in q)), x


def at(codes: Posterior, index: Any) -> Posterior:
    """The codes at `index`."""
    return Posterior(*(None if part is None else part[index] for part in codes))


class DatabaseSide(NamedTuple):
    """What the products of a search need of the database: the score of code j is phi . psi_j + bias_j, see `query_side`.

    Attributes:
        psi: (N, D); of the Euclidean distance the codes themselves, not a copy.
        bias: (N,), the part of a distance that depends on the database alone.
        norm, most: the largest norm of psi, and the largest bias.
    """

    psi: Tensor
    bias: Tensor
    norm: float
    most: float


def query_side(q: Posterior, distance: str) -> tuple[Tensor, Tensor]:
    """phi (B, D) and offset (B,): a distance (the square of a Euclidean one) is its score plus the offset, which ranks nothing.

    The Bhattacharyya distance is no product: there phi and psi are the posteriors, as (mean, variance).
    """
    if distance == "euclidean":
        return -2 * q.mean.float(), q.mean.double().square().sum(1)
    if distance == "cosine":
        return -normalize(q.mean.float(), dim=1), torch.ones(len(q.mean), device=q.mean.device)
    mean, log_var = q.mean.double(), q.log_var.double()  # products of precisions are too wide for float32
    if distance == "bhattacharyya":
        return torch.cat([mean, log_var.exp()], 1), -log_var.sum(1) / 4 - mean.shape[1] * math.log(2) / 2
    precision = (-log_var).exp()
    phi = torch.cat([(log_var.exp() + mean**2) / 2, precision / 2, -mean, -mean * precision], 1)
    return phi, (mean**2 * precision).sum(1) / 2 - mean.shape[1]


def database_side(x: Posterior, distance: str) -> DatabaseSide:
    """The database's part of the scores."""
    mean, log_var = x
    psi = mean.float() if log_var is None else torch.cat([mean, log_var], 1).double()
    bias = psi.new_zeros(1).expand(len(psi))
    if distance == "euclidean":
        bias = psi.norm(dim=1).square()
    elif distance == "cosine":
        psi = normalize(psi, dim=1)
    elif distance == "symmetric_kl":
        mean, log_var = psi.chunk(2, dim=1)
        precision = (-log_var).exp()
        psi = torch.cat([precision, log_var.exp() + mean**2, mean * precision, mean], 1)
        bias = (mean**2 * precision).sum(1) / 2
    elif distance == "bhattacharyya":
        mean, log_var = psi.chunk(2, dim=1)
        psi, bias = torch.cat([mean, log_var.exp()], 1), -log_var.sum(1) / 4
    norm, most = psi.norm(dim=1).max().item(), bias.max().item()
    if not math.isfinite(norm + most):
        raise ValueError("database: got NaN, infinity or a number too large, expected finite numbers")
    return DatabaseSide(psi, bias, norm, most)


def scores(phi: Tensor, side: DatabaseSide, distance: str) -> Tensor:
    """The distances less the queries' offsets, up to rounding: (B, N)."""
    if distance == "bhattacharyya":
        (mean, variance), (x_mean, x_variance) = (part.chunk(2, 1) for part in (phi, side.psi))
        both = variance[:, None] + x_variance  # (B, N, L)
        squared = (mean[:, None] - x_mean).square_().div_(both).sum(2)  # (B, N)
        return squared / 4 + both.log_().sum(2) / 2 + side.bias  # log cosh((a - b) / 2) = log(e^a + e^b) - (a + b) / 2 - log 2
    return torch.addmm(side.bias, phi, side.psi.T)


def exact_distances(q: Posterior, x: Posterior, columns: Tensor, distance: str) -> Tensor:
    """The distance of each query to its own columns, in float64 on the CPU, rounded: (B, L), (N, L), (B, C) -> (B, C) float32."""
    pair = (at(q, (slice(None), None)), at(x, columns.to(x.mean.device)))
    q, x = (Posterior(*(p if p is None else p.cpu().double() for p in codes)) for codes in pair)
    return distance_between(q, x, distance).float()


def precision_at_k(found: Tensor, query_labels: Tensor) -> Tensor:
    """The share of each query's neighbours that are of its class: labels found (Q, k), labels (Q,) -> (Q,). eq. recall-at-k"""
    return (found == query_labels[:, None]).double().mean(1)


def recall_at_k(found: Tensor, query_labels: Tensor, labels: Tensor) -> Tensor:
    """The share of the database's images of a query's class that were found: (Q, k), (Q,), (N,) -> (Q,). eq. recall-at-k

    With R such images it is k / R times the precision, and so at most k / R, however good the search.
    """
    return (found == query_labels[:, None]).sum(1).double() / check_relevant(query_labels, labels)


def knn_accuracy(found: Tensor, query_labels: Tensor) -> Tensor:
    """1 where the majority of a query's neighbours has its class; a tie goes to the class of the nearest: (Q, k), (Q,) -> (Q,)."""
    k = found.shape[1]
    votes = (found[:, :, None] == found[:, None]).sum(2)  # (Q, k): how many neighbours share the class of this one
    winner = (votes * (k + 1) - torch.arange(k, device=found.device)).argmax(1, keepdim=True)
    return (found.gather(1, winner)[:, 0] == query_labels).double()  # (Q,)


def average_precision(
    queries: Tensor | Posterior, query_labels: Tensor, database: Tensor | Posterior, labels: Tensor,
    distance: str = "euclidean", block: int = 100,
) -> Tensor:  # fmt: skip
    """Precision at each image of the query's class, averaged, over the ranking of the whole database: (Q,); its mean is the mAP.
    eq. average-precision

    `block` rankings are held at once. The ranking is by the rounded distances of one matrix product; ties go to the lower index.
    """
    q, x = check_pair(queries, database, distance)
    query_labels, labels = query_labels.cpu(), labels.cpu()
    relevant, result = check_relevant(query_labels, labels), []
    side = database_side(x, distance)
    for rows in blocks(q, x, distance, block):
        phi, _ = query_side(at(q, rows), distance)
        ranking = scores(phi, side, distance).argsort(dim=1, stable=True).cpu()
        hits = labels[ranking] == query_labels[rows, None]
        precision = hits.cumsum(1).double() / torch.arange(1, len(labels) + 1, device="cpu")
        result.append((precision * hits).sum(1) / relevant[rows])
    return torch.cat(result)


def check_relevant(query_labels: Tensor, labels: Tensor) -> Tensor:
    """How many of the database's images have the class of each query: (Q,), at least 1."""
    for argument, value in (("query_labels", query_labels), ("labels", labels)):
        check_classes(argument, value)
    relevant = torch.bincount(labels, minlength=int(query_labels.max()) + 1)[query_labels]
    if not relevant.all():
        missing = query_labels[relevant == 0][0].item()
        raise ValueError(f"query_labels: got class {missing}, expected classes that some image of the database has")
    return relevant


def check_classes(argument: str, value: Any, dim: int = 1) -> Tensor:
    """`value` if it is an int64 tensor of class numbers, none of them the -1 of an image without a label."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.dim() != dim or value.numel() == 0:
        raise ValueError(f"{argument}: got {describe(value)}, expected the numbers of classes, an int64 tensor with {dim} axes")
    if value.min() < 0:
        raise ValueError(f"{argument}: got {int((value < 0).sum())} images without a label (-1), expected a class for each")
    return value


def bootstrap_interval(values: Tensor, level: float = 0.95, num_resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of values (Q,): (low, high). Efron 1979."""
    if not 0 < check_number("level", level) < 1:
        raise ValueError(f"level: got {level}, expected a share between 0 and 1")
    generator = torch.Generator().manual_seed(check_seed("seed", seed))
    values, shape = values.cpu().double(), (check_int("num_resamples", num_resamples), *values.shape)
    drawn = (torch.randint(len(values), shape[1:], generator=generator, device="cpu") for _ in range(shape[0]))
    means = torch.stack([values[these].mean() for these in drawn])
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device="cpu")).tolist()
    return low, high


def score_retrieval(
    found: Tensor, query_labels: Tensor, labels: Tensor, k: int = 10, seed: int = 0, **per_query: Tensor
) -> dict[str, dict[str, float]]:
    """Precision and recall at k and kNN accuracy: the mean of each, with its 95 % bootstrap interval over the queries.

    Args:
        found: labels of each query's neighbours, nearest first, (Q, k or more).
        query_labels: (Q,).
        labels: of the database, (N,).
        per_query: more scores (Q,) by name, such as ``mean_average_precision=average_precision(...)``.

    Raises:
        ValueError: For k above the number of neighbours, or labels that are no numbers of classes, -1 for want of one, or all the same.
    """
    check_classes("query_labels", query_labels), check_classes("labels", labels)
    if check_int("k", k) > check_classes("found", found, 2).shape[1]:
        raise ValueError(f"k: got {k}, expected at most the {found.shape[1]} neighbours that were found")
    if (labels == labels[0]).all():
        raise ValueError(f"labels: got class {int(labels[0])} for all images, expected several: of one class all is right")
    found = found[:, :k]
    per_query["precision_at_k"] = precision_at_k(found, query_labels)
    per_query["recall_at_k"] = recall_at_k(found, query_labels, labels)
    per_query["knn_accuracy"] = knn_accuracy(found, query_labels)
    intervals = {name: bootstrap_interval(values, seed=seed) for name, values in per_query.items()}
    return {name: {"mean": per_query[name].mean().item(), "low": low, "high": high} for name, (low, high) in intervals.items()}


def fingerprint(model: VAE) -> str:
    """SHA-256 of the model's config and weights."""
    digest = hashlib.sha256(json.dumps(model.config, sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(repr=False)
class LatentIndex:
    """Images by their posteriors, to be searched by content; made by `build` or `load`.

    Attributes:
        model: the model that encodes images and queries.
        codes: mean and log_var of the posteriors, each (N, L); memory-mapped after `load`.
        labels: int64 (N,), -1 where an image has none.
        classes: the name of each label.
        names: the file of each image, or ().
        source: where the images come from, for pictures of them: {"data": ..., "split": ...} are arguments of `load_images`, whose
            order the index has; {"folder": ...} is a folder that has the files `names`; {} says nothing.
        method: ``"exact"``, or FAISS's ``"hnsw"`` or ``"ivf_pq"``: approximate, Euclidean only.
        model_hash: the `fingerprint` of the model when its first image was encoded.

    Example:
        >>> import vaelib
        >>> model, digits = vaelib.mlp_vae((1, 28, 28), latent_dim=8), vaelib.load_images("digits")
        >>> index = vaelib.LatentIndex.build(model, digits)
        >>> index.search(digits.pixels[3:5], k=1).indices.flatten()  # each image finds itself
        tensor([3, 4])
    """

    model: VAE
    codes: Posterior
    labels: Tensor
    classes: tuple[str, ...]
    names: tuple[str, ...]
    source: dict[str, str]
    method: str
    model_hash: str
    # FAISS's, of the distinct codes: many equal ones would cut the graph of HNSW in parts that cannot be reached
    structure: Any = None
    rows: Any = None  # beside it, int64: the images, those of one code together (N,), and where those of each code start (D,)

    @classmethod
    def build(
        cls, model: VAE, images: ImageSet | Tensor, batch_size: int = 1000, method: str = "exact", names: Sequence[str] = (),
        source: dict[str, str] | None = None,
    ) -> LatentIndex:  # fmt: skip
        """Index images, encoded in chunks to posteriors; nothing is sampled.

        HNSW built by several threads may differ a little from build to build.

        Args:
            model: what encodes the images, and later the queries.
            images: an `ImageSet` or ``uint8`` pixels (N, C, H, W).
            batch_size: images encoded at once.
            method: ``"exact"``, ``"hnsw"`` or ``"ivf_pq"``.
            names: one file name for each image, or none at all.
            source: see the attributes.

        Raises:
            ValueError: For a conditional model that is not bound, images of another shape, names for only some images, an unknown
                method or one of FAISS where that is missing, or fewer than 256 images for ``"ivf_pq"``.
        """
        check_choice("method", method, METHODS)
        if isinstance(model, ConditionalVAE):
            raise ValueError("model: got a conditional VAE, expected one that encodes without labels")
        codes = Posterior(*torch.empty(2, 0, model.latent_dim, device="cpu"))
        index = cls(model, codes, torch.empty(0, dtype=torch.int64, device="cpu"), (), (), source or {}, method, fingerprint(model))
        index.add(images, names, batch_size)
        return index

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"LatentIndex({len(self)} images, {self.model.latent_dim} latents, {self.method!r})"

    def label(self, i: int) -> str | None:
        """The class of image i; None where it has none. ValueError unless i is from 0 to N - 1."""
        if not 0 <= i < len(self):
            raise ValueError(f"i: got {describe(i)}, expected the index of one of the {len(self)} images")
        return self.classes[self.labels[i]] if self.labels[i] >= 0 else None

    def to(self, device: torch.device | str) -> LatentIndex:
        """The same index; its model encodes and an exact search runs on `device`."""
        self.model.to(device)
        self.codes = Posterior(*(part.to(device) for part in self.codes))
        return self

    def add(self, images: ImageSet | Tensor, names: Sequence[str] = (), batch_size: int = 1000) -> None:
        """Index more images; they get the next indices. `source` no longer holds for an index that had images, and becomes {}.

        Raises:
            ValueError: For images of another shape or other classes, a model trained since, or names for only some images.
        """
        new = self._encode(images, batch_size)
        count = len(new.mean)
        names = names or getattr(images, "names", ())
        labelled = isinstance(images, ImageSet) and images.labelled
        classes = images.classes if labelled else ()  # type: ignore[union-attr]
        labels = images.labels.cpu() if labelled else torch.full((count,), -1, device="cpu")  # type: ignore[union-attr]
        if self.classes and classes and self.classes != classes:
            raise ValueError(f"images: got the classes {describe(classes)}, expected those of the index, {describe(self.classes)}")
        if len(names) not in ({0, count} if len(self) == 0 else {count if self.names else 0}):
            raise ValueError(f"names: got {len(names)} for {count} images, expected one for each image, or none at all")
        device = self.codes.mean.device
        codes = Posterior(*(torch.cat([old, part.to(device)]) for old, part in zip(self.codes, new, strict=True)))
        if self.method != "exact":
            self.structure, self.rows = extended(self.structure, self.method, codes.mean.cpu(), len(self))
        self.source = {} if len(self) else self.source
        self.codes = codes
        self.labels, self.names = torch.cat([self.labels, labels]), (*self.names, *names)
        self.classes = self.classes or classes

    def search(
        self, queries: ImageSet | Tensor | Posterior, k: int = 10, distance: str = "euclidean", effort: int = 64
    ) -> Neighbours:
        """The k nearest images of each query, nearest first; indices count in the order of indexing.

        Distances between posteriors (``"symmetric_kl"``, ``"bhattacharyya"``) are in nats; those between means have no unit.

        Args:
            queries: images (``uint8`` pixels (Q, C, H, W) or an `ImageSet`), posteriors, or means (Q, L).
            k: neighbours per query, at most N.
            distance: see `distance_between`; the FAISS methods know ``"euclidean"`` only.
            effort: of the FAISS methods: efSearch of HNSW, nprobe of IVF-PQ, whose best 10 k codes are ranked by their true distance.

        Raises:
            ValueError: For images of another shape, an unknown distance, or k above the size of the index.
        """
        if not isinstance(queries, tuple) and not (isinstance(queries, Tensor) and queries.dim() == 2):
            queries = self._encode(queries)
        if check_int("k", k) > len(self):
            raise ValueError(f"k: got {k}, expected at most the {len(self)} images of the index")
        if self.method == "exact":
            return nearest_neighbours(queries, self.codes if distance in STATISTICAL else self.codes.mean, k, distance)
        if check_choice("distance", distance, DISTANCES) != "euclidean":
            raise ValueError(f"distance: got {distance!r}, expected 'euclidean' with the method {self.method!r}")
        q, x = check_pair(queries, self.codes.mean, distance)
        wanted = min(k if self.method == "hnsw" else 10 * k, len(self))
        if self.method == "hnsw":
            self.structure.hnsw.efSearch = max(check_int("effort", effort), k)
        else:
            self.structure.nprobe = min(check_int("effort", effort), self.structure.nlist)
        hits = torch.from_numpy(self.structure.search(q.mean.float().cpu().numpy(), min(wanted, self.structure.ntotal))[1])
        columns, lacking = self._expanded(q, hits, k)
        distances = exact_distances(q, x, columns, distance)
        order = distances.argsort(dim=1, stable=True)
        found = Neighbours(columns.gather(1, order), distances.gather(1, order))
        if lacking.any():
            for part, exact in zip(found, nearest_neighbours(q.mean[lacking.to(x.mean.device)], x.mean, k), strict=True):
                part[lacking] = exact
        return found

    def _expanded(self, q: Posterior, hits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The images of the distinct codes `hits` (Q, C), -1 where FAISS came upon no more, nearest codes first, up to k of them.

        Returns:
            The images (Q, k), sorted by their indices, and which queries lack some of their k, bool (Q,).
        """
        rows, starts = self.rows
        counts = torch.diff(starts, append=torch.tensor([len(rows)], device="cpu"))
        hits = hits.sort(1).values  # so that a stable sort leaves ties in the order of their first images
        distances = exact_distances(q, Posterior(self.codes.mean, None), rows[starts[hits.clamp(min=0)]], "euclidean")  # type: ignore[arg-type]
        hits = hits.gather(1, distances.masked_fill(hits < 0, torch.inf).argsort(dim=1, stable=True))
        held = counts[hits.clamp(min=0)].masked_fill(hits < 0, 0)  # images of each code
        ends = held.cumsum(1)
        place = torch.arange(k, device="cpu").repeat(len(hits), 1)
        column = torch.searchsorted(ends, place, right=True).clamp(max=hits.shape[1] - 1)  # of the code whose image stands there
        offset = (place - (ends - held).gather(1, column)).minimum(held.gather(1, column) - 1).clamp(min=0)
        return rows[starts[hits.gather(1, column).clamp(min=0)] + offset].sort(1).values, ends[:, -1] < k

    def save(self, path: str | Path) -> None:
        """Write the index with its model to one safetensors file, whole or not at all.

        Raises:
            ValueError: If the file cannot be written, or the model was not built by a function of vaelib.
        """
        self._check_model()
        if self.model.config is None or signature(self.model) != signature(build(self.model.config)):
            raise ValueError("model: got a VAE that its config does not build again, expected one built by a function of vaelib")
        about = {name: getattr(self, name) for name in ("classes", "source", "method", "model_hash")}
        about |= {"version": INDEX_VERSION, "config": self.model.config}
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {"mean": self.codes.mean, "log_var": self.codes.log_var, "labels": self.labels}
        tensors["names"] = torch.frombuffer(bytearray(json.dumps(self.names).encode()), dtype=torch.uint8)
        if self.structure is not None:
            tensors["structure"] = torch.from_numpy(faiss().serialize_index(self.structure))
            tensors["rows"], tensors["starts"] = self.rows
        path = as_path(path)
        writable_folder("path", path.parent)
        try:
            with atomic(path) as partial:
                write_tensors(partial, tensors, {"index": json.dumps(about)})
        except (OSError, SafetensorError) as error:
            raise ValueError(f"path: got {path}, expected a file that can be written ({error})") from error

    @classmethod
    def load(cls, path: str | Path, model: VAE | None = None) -> LatentIndex:
        """The index that `save` wrote, with `model` or, by default, the one in the file; no code from the file is run.

        The codes are memory-mapped: a search reads them block by block, and they may be larger than the memory.

        Raises:
            ValueError: If the file is broken, no index or of another version, or was made with another model.
        """
        path = as_path(path)
        try:
            if path.is_dir():
                raise ValueError("it is a folder")
            with safe_open(path, "pt") as file:
                if "index" not in (metadata := file.metadata() or {}):
                    raise ValueError("it has no index in it")
                about = json.loads(metadata["index"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about["version"] != INDEX_VERSION:
                raise ValueError(f"it is of version {about['version']}, this vaelib reads {INDEX_VERSION}")
            if model is None:
                model = build(about["config"]).eval()
                weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
                model.load_state_dict(weights, assign=True)
            codes, labels = Posterior(tensors["mean"], tensors["log_var"]), tensors["labels"]
            if {tuple(part.shape) for part in codes} != {(len(labels), model.latent_dim)}:
                raise ValueError("its parts are of different sizes")
            names = tuple(json.loads(bytes(tensors["names"].numpy())))
            classes, method = tuple(about["classes"]), check_choice("method", about["method"], METHODS)
            structure = None if method == "exact" else faiss().deserialize_index(tensors["structure"].numpy())
            every = torch.arange(len(labels), device="cpu")  # a file of version 0.1.0 has each image's code in the structure
            rows = () if structure is None else (tensors.get("rows", every), tensors.get("starts", every))
            if structure is not None and tuple(map(len, rows)) != (len(labels), structure.ntotal):
                raise ValueError("its parts are of different sizes")
            index = cls(model, codes, labels, classes, names, about["source"], method, about["model_hash"], structure, rows)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"path: got {path}, expected an index written by LatentIndex.save ({reason})") from error
        index._check_model()
        return index

    def _encode(self, images: ImageSet | Tensor, batch_size: int = 1000) -> Posterior:
        self._check_model()
        return posteriors(self.model, images, batch_size)

    def _check_model(self) -> None:
        if fingerprint(self.model) != self.model_hash:
            raise ValueError("model: got another config or other weights, expected the model that the index was built with")


def is_index(path: str | Path) -> bool:
    """Whether the file is one that `LatentIndex.save` wrote, by its header."""
    try:
        with safe_open(as_path(path), "pt") as file:
            return "index" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def faiss() -> Any:
    """The module; a ValueError that says how to get it where it is missing."""
    try:
        import faiss
    except ImportError as error:
        raise ValueError("method: got one of FAISS, which is not installed; pip install faiss-cpu, or use 'exact'") from error
    return faiss


def by_code(codes: Tensor) -> tuple[Tensor, Tensor]:
    """The rows, those of equal codes together, and where each distinct code starts among them: (N, L) float32 -> (N,), (D,), on the CPU.

    Both are in order: codes by the first row that has them.
    """
    values = np.ascontiguousarray((codes + 0.0).numpy())  # + 0.0: -0 and 0 are one number, with different bits
    whole = values.view(np.dtype((np.void, values[0].nbytes)))[:, 0]
    _, first, code = np.unique(whole, return_index=True, return_inverse=True)
    rows = np.argsort(first[code], kind="stable")
    return torch.from_numpy(rows), torch.from_numpy(np.flatnonzero(np.isin(rows, first)))


def extended(structure: Any, method: str, codes: Tensor, known: int = 0) -> tuple[Any, tuple[Tensor, Tensor]]:
    """FAISS's structure over the distinct ones of the codes (N, L), and which rows have each, see `by_code`.

    A structure that is there has those of the first `known` codes, and the others are added; without one it is made, and trained on
    all. HNSW: 32 links, efConstruction 100 (Malkov and Yashunin 2020). IVF-PQ: 4 sqrt(N) lists, one byte for four latents or more
    (Jegou, Douze and Schmid 2011); of a code the bytes say what is left of it after the centre of its list, and the distance to a query
    is that to what they say. eq. product-quantization
    """
    rows = by_code(codes)
    first = rows[0][rows[1]]
    mean = codes[first[first >= known]]
    count, width = mean.shape
    if structure is None and method == "hnsw":
        structure = faiss().IndexHNSWFlat(width, 32)
        structure.hnsw.efConstruction = 100
    elif structure is None:
        if count < 256:
            raise ValueError(f"images: got {count}, expected at least 256 with distinct codes to train the method 'ivf_pq' on")
        pieces = max(m for m in range(1, max(2, width // 4 + 1)) if width % m == 0)
        # "np": without polysemous codes, which no search here uses and which take half a minute
        structure = faiss().index_factory(width, f"IVF{min(4 * math.isqrt(count), count // 40 + 1)},PQ{pieces}x8np")
        structure.cp.min_points_per_centroid = structure.pq.cp.min_points_per_centroid = 1  # else it prints advice
        structure.pq.cp.niter, structure.pq.cp.max_points_per_centroid = 10, 64  # a tenth of the usual time
        structure.train(mean.numpy())
    structure.add(mean.numpy())
    return structure, rows
