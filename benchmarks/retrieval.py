"""Recall against queries per second of the three methods of `LatentIndex`, and exact search beside FAISS's flat index.

    python benchmarks/retrieval.py [--size 1000000] [--flat 60000] [--rounds 5] [--json]

Needs `pip install faiss-cpu`. Codes are synthetic, of 64 dimensions, from a mixture of 1000 components: each has a centre from N(0, I)
and spreads in 8 random directions with deviation 0.5 and in all others with 0.1, as latent codes crowd near sheets of few
dimensions. (Codes from N(0, I) itself have no neighbourhoods that an approximate index could follow.) The queries are new draws.

- `flat`: exact search of `--flat` codes from N(0, I), k = 10: `nearest_neighbours` and FAISS's `IndexFlatL2`, 1000 queries in one call and
  in ten. They take turns, round by round; the fastest round of each counts, since other work on the machine only ever adds time.
- `methods`: `LatentIndex.search` of `--size` codes with 1000 queries at once, k = 10: seconds to build, and for each effort the queries
  per second and the recall, the share of the true ten neighbours among the ten that were found.

With VAELIB_RESULTS set the table is entered into the ledger as `retrieval-speed`.
"""

import argparse
import json
import sys
import time

import faiss
import torch

import vaelib
from vaelib.book.ledger import hardware, record
from vaelib.retrieval import LatentIndex, extended, nearest_neighbours
from vaelib.vae import Posterior

LATENTS, K, QUERIES, COMPONENTS = 64, 10, 1000, 1000
EFFORTS = {"hnsw": (16, 32, 64, 128, 256), "ivf_pq": (1, 4, 16, 64)}


def mixture(count, seed):
    """Codes (count, 64) of the mixture; the components are the same for every seed."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(COMPONENTS, LATENTS, generator=generator)
    directions = torch.linalg.qr(torch.randn(COMPONENTS, LATENTS, 8, generator=generator)).Q
    generator.manual_seed(seed)
    parts = []
    for start in range(0, count, 10000):
        rows = min(10000, count - start)
        component = torch.randint(COMPONENTS, (rows,), generator=generator)
        along = torch.randn(rows, 8, 1, generator=generator)
        noise = torch.randn(rows, LATENTS, generator=generator)
        parts.append(centres[component] + 0.5 * (directions[component] @ along)[..., 0] + 0.1 * noise)
    return torch.cat(parts)


def fastest(works, rounds):
    """Seconds of the fastest round of each piece of work, after one round to warm up."""
    seconds = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(times[1:]) for name, times in seconds.items()}


def beside_flat(count, rounds):
    """Queries per second of exact search of so many codes, ours and FAISS's."""
    generator = torch.Generator().manual_seed(0)
    codes, queries = torch.randn(count, LATENTS, generator=generator), torch.randn(QUERIES, LATENTS, generator=generator)
    flat = faiss.IndexFlatL2(LATENTS)
    flat.add(codes.numpy())
    expected = flat.search(queries.numpy(), K)[1]
    same = (torch.from_numpy(expected) == nearest_neighbours(queries, codes, K).indices).double().mean().item()
    works = {}
    for size in (QUERIES, 100):
        works[f"vaelib, {size} a call"] = lambda size=size: [nearest_neighbours(part, codes, K) for part in queries.split(size)]
        works[f"faiss flat, {size} a call"] = lambda size=size: [flat.search(part.numpy(), K) for part in queries.split(size)]
    rates = {name: QUERIES / seconds for name, seconds in fastest(works, rounds).items()}
    over = {size: rates[f"vaelib, {size} a call"] / rates[f"faiss flat, {size} a call"] for size in (QUERIES, 100)}
    return {
        "queries_per_second": {name: round(rate) for name, rate in rates.items()},
        "vaelib_over_faiss_flat": {f"{size} a call": round(ratio, 2) for size, ratio in over.items()},
        "same_neighbours": same,
    }


def methods(size, rounds):
    """For each method seconds to build, and queries per second and recall by effort."""
    codes, queries = mixture(size, 1), mixture(QUERIES, 2)
    posterior = Posterior(codes, torch.zeros(1).expand_as(codes))
    model = vaelib.mlp_vae((1, 4, 4), (4,), LATENTS)  # encodes nothing here
    labels = torch.full((size,), -1)

    def measured(index, effort):
        works = {"search": lambda: index.search(queries, K, effort=effort)}
        return index.search(queries, K, effort=effort).indices, QUERIES / fastest(works, rounds)["search"]

    truth, exact_rate = measured(LatentIndex(model, posterior, labels, (), (), {}, "exact", ""), 1)
    result = {"exact": {"queries_per_second": round(exact_rate)}}
    for method, efforts in EFFORTS.items():
        start = time.perf_counter()
        structure, distinct = extended(None, method, codes)
        rows = {"build_seconds": round(time.perf_counter() - start, 1), "efforts": {}}
        index = LatentIndex(model, posterior, labels, (), (), {}, method, "", structure, distinct)
        for effort in efforts:
            found, rate = measured(index, effort)
            recall = (found[:, :, None] == truth[:, None]).any(2).double().mean().item()
            numbers = {
                "recall_at_10": round(recall, 4),
                "queries_per_second": round(rate),
                "over_exact": round(rate / exact_rate, 2),
            }
            rows["efforts"][str(effort)] = numbers
        result[method] = rows
        print(f"{method}: built in {rows['build_seconds']} s", file=sys.stderr)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1_000_000, help="codes in the index; 0 leaves this part out")
    parser.add_argument("--flat", type=int, default=60_000, help="codes of the exact search")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    start = time.perf_counter()
    metrics = {"flat": beside_flat(arguments.flat, arguments.rounds)}
    if arguments.size:
        metrics["size"], metrics["methods"] = arguments.size, methods(arguments.size, arguments.rounds)
    command = f"python benchmarks/retrieval.py --size {arguments.size} --rounds {arguments.rounds}"
    command += f" --flat {arguments.flat}" * (arguments.flat != 60_000)
    made = record("retrieval-speed", command, 0, time.perf_counter() - start, metrics)
    if arguments.json:
        print(json.dumps(made))
        return
    print(f"{hardware()['processor']}, {torch.get_num_threads()} threads")
    for name, rate in metrics["flat"]["queries_per_second"].items():
        print(f"  {arguments.flat} codes  {name:24} {rate:8} queries/s")
    for call, ratio in metrics["flat"]["vaelib_over_faiss_flat"].items():
        print(f"  {call}: vaelib is {ratio} times as fast as FAISS's flat index")
    for method, rows in metrics.get("methods", {}).items():
        efforts = rows.get("efforts", {"-": {"recall_at_10": 1.0, "over_exact": 1.0, **rows}})
        for effort, row in efforts.items():
            rate, recall, over = row["queries_per_second"], row["recall_at_10"], row["over_exact"]
            print(
                f"  {arguments.size} codes  {method:7} effort {effort:>3} {rate:7} queries/s  recall {recall:.3f} {over:.2f} times exact"
            )


if __name__ == "__main__":
    sys.exit(main())
