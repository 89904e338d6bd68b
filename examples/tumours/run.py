"""Compare FedOAP, FedAvg and training alone on real tumour images; see README.md beside this file.

python examples/tumours/run.py --data /path/to/tumours --out runs --seed 0 --seed 1
"""

import statistics
import tomllib
from collections.abc import Mapping
from pathlib import Path

import click
from rich.console import Console

from fedoap.report.results import Results
from fedoap.simulation.config import load_simulation
from fedoap.simulation.layout import make_layout
from fedoap.simulation.run import simulate
from fedoap.study.tables import changed
from fedoap.toml import to_toml

HERE = Path(__file__).parent
Table = dict[str, object]
FEDAVG: Table = {"name": "fedavg", "personal": []}
# Training alone needs no federation of its own: it takes as many steps as FedOAP, and runs beside it.
VARIANTS: Mapping[str, Table] = {
    "fedoap": {"local_only": True},
    "fedavg": {
        "local_only": False,
        "federation": {"strategy": FEDAVG, "network": {"attention": "projection"}},
    },
}


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True)
@click.option("--variant", "variants", type=click.Choice(list(VARIANTS)), multiple=True, default=tuple(VARIANTS))
@click.option("--rounds", type=int, help="Another number of rounds than tumours.toml's.")
def main(*, data: Path, out: Path, seeds: tuple[int, ...], variants: tuple[str, ...], rounds: int | None) -> None:
    """Run every variant with every seed, one after the other, and print a table of test Dice."""
    results: dict[tuple[str, int], Results] = {}
    for seed in seeds:
        for variant in variants:
            layout = make_layout(out / f"{variant}-{seed}", overwrite=True)
            config = _write_config(layout.out / "simulate.toml", data, variant, seed, rounds)
            print(f"{variant}, seed {seed}: {layout.report}", flush=True)
            results[variant, seed] = simulate(load_simulation(config), layout, Console())
    (out / "table.md").write_text(_table(results), encoding="utf-8")
    print(_table(results))


def _write_config(path: Path, data: Path, variant: str, seed: int, rounds: int | None) -> Path:
    text = (HERE / "tumours.toml").read_text(encoding="utf-8")
    values = changed(tomllib.loads(text.replace('"data/', f'"{data.absolute()}/')), VARIANTS[variant])
    values = changed(values, {"federation": {"seed": seed} | ({"rounds": {"count": rounds}} if rounds else {})})
    path.write_text(to_toml(values), encoding="utf-8")
    return path


def _table(results: Mapping[tuple[str, int], Results]) -> str:
    first = next(iter(results.values()))
    names = [*first.sites, "mean", *first.unseen]
    lines = [f"| method | seed | {' | '.join(names)} | minutes |", "|---" * (len(names) + 3) + "|"]
    for (variant, seed), each in results.items():
        unseen = [site.dice for site in each.unseen.values()]
        rows = {
            variant: [site.dice for site in each.sites.values() if site.dice is not None],
            f"{variant}, not calibrated": [site.metrics["dice_test_before"] for site in each.sites.values()],
            "alone": [site.dice_local for site in each.sites.values() if site.dice_local is not None],
        }
        for method, dice in rows.items():
            if dice:
                shown = [*dice, statistics.mean(dice), *([] if method == "alone" else unseen)]
                cells = [f"{value:.3f}" for value in shown] + [""] * (len(names) - len(shown))
                lines.append(f"| {method} | {seed} | {' | '.join(cells)} | {each.seconds / 60:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
