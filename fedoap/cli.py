"""The command line `fedoap`: try, simulate, study, evaluate, predict, report.

What a command needs is imported when it runs: help must not wait for PyTorch.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from fedoap import __version__
from fedoap.config import Modality
from fedoap.errors import FedoapError

if TYPE_CHECKING:
    from rich.console import Console

    from fedoap.report.results import Results
    from fedoap.segmentation.datalist import Split
    from fedoap.segmentation.phantoms import Organ

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
PRESENT = click.Path(exists=True, path_type=Path)
SPLITS = click.Choice(["training", "validation", "test"])
MODALITIES = click.Choice(get_args(Modality))
TORCH_MISSING = "this command needs PyTorch; install it with: pip install 'fedoap[node]'"

EXAMPLES = """\b
Examples:
  fedoap demo
  fedoap simulate examples/tumours/tumours.toml --out run
  fedoap evaluate --site hospital_a --split test --json figures.json
  fedoap predict --site hospital_a scan.nii.gz -o mask.nii.gz
"""


def main() -> None:
    """Run the command line; what a user can set right is one line and exit code 2."""
    try:
        code = cli.main(standalone_mode=False, prog_name="fedoap")
    except (FedoapError, click.ClickException) as error:
        sys.exit(_complain(error.format_message() if isinstance(error, click.ClickException) else str(error)))
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "monai", "jinja2", "matplotlib", "PIL", "scipy", "nibabel", "pydicom"):
            raise
        sys.exit(_complain(TORCH_MISSING))
    except OSError as error:
        sys.exit(_complain(f"{error.filename or 'disk'}: the system refused: {error.strerror or error}"))
    except click.Abort:
        click.echo("fedoap: interrupted", err=True)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _complain(text: str) -> int:
    one_line = " ".join(text.split())
    click.echo(f"fedoap: {one_line}", err=True)
    return 2


@click.group(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fedoap")
def cli() -> None:
    """Personalised federated tumour segmentation (FedOAP).

    The daemons have commands of their own: fedoap-coordinator and fedoap-node.
    """


@cli.command(epilog="Example: fedoap demo --out demo --overwrite")
@click.option("--out", type=FOLDER, default=Path("demo"), show_default=True, help="Folder of everything it leaves.")
@click.option("--overwrite", is_flag=True, help="Delete what an earlier simulation left there.")
def demo(*, out: Path, overwrite: bool) -> None:
    """Federate three phantom hospitals on this machine; a fourth organ stays unseen."""
    from fedoap.simulation.demo import run_demo

    _summarise(run_demo(out, _console(), overwrite=overwrite), out)


@cli.command(epilog="Example: fedoap simulate examples/tumours/tumours.toml --out run")
@click.argument("config", type=FILE)
@click.option("--out", type=FOLDER, required=True, help="Folder of everything it leaves; new or empty.")
@click.option("--overwrite", is_flag=True, help="Delete what an earlier simulation left there.")
def simulate(*, config: Path, out: Path, overwrite: bool) -> None:
    """Run the federation of CONFIG on this machine: real processes, real keys, loopback."""
    from fedoap.simulation.config import load_simulation
    from fedoap.simulation.layout import make_layout
    from fedoap.simulation.run import simulate as run

    checked = load_simulation(config)
    _summarise(run(checked, make_layout(out, overwrite=overwrite), _console()), out)


@cli.command(epilog="Example: fedoap study examples/tumours/study.toml --out study --only local --only fedoap")
@click.argument("config", metavar="STUDY", type=FILE)
@click.option("--out", type=FOLDER, required=True, help="Folder of everything it leaves; of this study's, or new.")
@click.option("--jobs", type=click.IntRange(1), help="Runs at a time.  [default: cores, by the threads of each]")
@click.option("--ray", "on_ray", is_flag=True, help="Run on a Ray cluster that sees --out and the images.")
@click.option("--only", multiple=True, metavar="VARIANT", help="Run this variant; give it again for another.")
@click.option("--until", type=click.FloatRange(0), metavar="MINUTES", help="Start no run later than that.")
def study(
    *, config: Path, out: Path, jobs: int | None, on_ray: bool, only: tuple[str, ...], until: float | None
) -> int:
    """Run the grid of STUDY (variants, folds, seeds) as far as it is missing, and write its tables.

    Ended at any moment and started again, it goes on where it was. Exit code 1: a run failed.
    """
    from fedoap.study.config import load_study
    from fedoap.study.runner import Options, run_study

    options = Options(jobs or 0, on_ray, only, until)
    outcome = run_study(load_study(config), out, options, _console())
    left = f", {outcome.left} left for another time" if outcome.left else ""
    failed = f", {len(outcome.failed)} failed: {', '.join(sorted(outcome.failed))}" if outcome.failed else ""
    click.echo(f"{outcome.done} runs done{left}{failed}; see {out}")
    return 1 if outcome.failed else 0


@cli.command(epilog="Example: fedoap evaluate --site hospital_a --datalist list.json --split test --json figures.json")
@click.option("--site", help="Name of the site whose model, settings and datalist are used.")
@click.option("--home", type=FOLDER, help="Folder that holds the sites' folders, if not a usual place.")
@click.option("--model", type=FOLDER, help="Folder that `fedoap-coordinator export` left, instead of --site.")
@click.option("--config", type=FILE, help="A site.toml that says how to read the images, with --model.")
@click.option("--datalist", type=FILE, help="Another datalist than the settings'.")
@click.option("--modality", type=MODALITIES, help="Another modality than the settings'.")
@click.option("--split", type=SPLITS, default="test", show_default=True, help="List of cases.")
@click.option("--json", "output", type=FILE, required=True, help="Where the figures go.")
@click.option("--pictures", type=FOLDER, help="Also leave pictures of some cases in this folder.")
@click.option("--shared", is_flag=True, help="The shared model, without the site's personal parameters.")
@click.option("--threads", type=int, default=0, help="CPU threads; 0 lets PyTorch choose.")
def evaluate(
    *,
    site: str | None,
    home: Path | None,
    model: Path | None,
    config: Path | None,
    datalist: Path | None,
    modality: Modality | None,
    split: str,
    output: Path,
    pictures: Path | None,
    shared: bool,
    threads: int,
) -> None:
    """Measure a model on labelled cases: Dice, IoU, HD95 and NSD, each case and on average."""
    _one_of(site=site, model=model)
    if model and not (config or datalist):
        raise click.UsageError("--model needs --config or --datalist, which say what to evaluate on")
    from fedoap.apply import Source, as_split, evaluate_split

    source = Source(site, home, model, config, datalist, modality, shared, threads)
    found = evaluate_split(source, as_split(split), output, pictures)
    mean = found.mean
    click.echo(
        f"{len(found.cases)} cases: Dice {mean.dice:.3f}, IoU {mean.iou:.3f}, "
        f"HD95 {mean.hd95:.1f} {found.unit}, NSD {mean.nsd:.3f} within {found.tolerance:g} {found.unit}"
    )


@cli.command(epilog="Example: fedoap predict --site hospital_a scan.nii.gz -o mask.nii.gz")
@click.argument("image", type=PRESENT)
@click.option(
    "--output", "-o", type=FILE, required=True, help="Where the mask goes: .png, .tif, .bmp, .nii or .nii.gz."
)
@click.option("--site", help="Name of the site whose model and settings are used.")
@click.option("--home", type=FOLDER, help="Folder that holds the sites' folders, if not a usual place.")
@click.option("--model", type=FOLDER, help="Folder that `fedoap-coordinator export` left, instead of --site.")
@click.option("--modality", type=MODALITIES, help="Another modality than the settings'.")
@click.option("--shared", is_flag=True, help="The shared model, without the site's personal parameters.")
def predict(
    *,
    image: Path,
    output: Path,
    site: str | None,
    home: Path | None,
    model: Path | None,
    modality: Modality | None,
    shared: bool,
) -> None:
    """Write the tumour mask of IMAGE (a file, or a folder of a DICOM series) with the image's geometry."""
    _one_of(site=site, model=model)
    from fedoap.apply import Source, predict_mask

    source = Source(site=site, home=home, model=model, modality=modality, shared=shared)
    marked = predict_mask(source, image, output)
    click.echo(f"{output}: {marked} voxels marked")


@cli.command(epilog="Example: fedoap phantoms data/liver --organ liver-ct --size 128 128")
@click.argument("folder", type=FOLDER)
@click.option("--organ", type=click.Choice(["brain-mr", "liver-ct", "breast-us", "lung-ct"]), required=True)
@click.option("--size", type=int, nargs=2, default=(64, 64), show_default=True, help="Pixels down and across.")
@click.option("--slices", type=click.IntRange(1), help="Draw volumes of so many slices, as NIfTI, not pictures.")
@click.option("--training", type=click.IntRange(1), default=48, show_default=True, help="Cases to train on.")
@click.option("--validation", type=click.IntRange(1), default=12, show_default=True, help="Cases to choose by.")
@click.option("--test", type=click.IntRange(1), default=24, show_default=True, help="Cases to measure on.")
@click.option("--seed", type=int, default=0, show_default=True, help="Fixes every pixel.")
def phantoms(
    *,
    folder: Path,
    organ: "Organ",
    size: tuple[int, int],
    slices: int | None,
    training: int,
    validation: int,
    test: int,
    seed: int,
) -> None:
    """Draw invented patients with tumours into FOLDER, to try a site without anybody's data."""
    from fedoap.segmentation.phantoms import write_phantoms

    counts: dict[Split, int] = {"training": training, "validation": validation, "test": test}
    click.echo(write_phantoms(folder, organ, counts, size if slices is None else (*size, slices), seed))


@cli.command(epilog="Example: fedoap report demo")
@click.argument("results", type=PRESENT)
@click.option("--output", "-o", type=FILE, help="The page.  [default: report.html beside the results]")
@click.option("--markdown", type=FOLDER, help="Leave a study's page here as Markdown, its figures as SVG.")
def report(*, results: Path, output: Path | None, markdown: Path | None) -> None:
    """Write one HTML page that needs no other file, of a simulation's or study's folder or of RESULTS as JSON.

    RESULTS may also be what `fedoap-coordinator results --json` prints. Pictures are taken from the
    folder evaluation/ beside it: NAME.json and NAME/, as `fedoap evaluate` leaves them with --json and
    --pictures.
    """
    from fedoap.report.page import write_report
    from fedoap.report.study import is_study, write_study_markdown, write_study_report

    if markdown:
        if output:
            raise click.UsageError("give either --output or --markdown")
        if not is_study(results):
            raise click.UsageError(f"--markdown needs the folder of a study, but {results} holds no cases.csv")
        click.echo(write_study_markdown(results, markdown))
        return
    file = results / "results.json" if results.is_dir() else results
    page = output or file.with_name("report.html")
    if is_study(results):
        write_study_report(results, page)
    else:
        write_report(file, page)
    click.echo(page)


def _one_of(site: str | None, model: Path | None) -> None:
    if (site is None) == (model is None):
        raise click.UsageError("give either --site or --model")


def _console() -> "Console":
    from rich.console import Console

    return Console()


def _summarise(results: "Results", out: Path) -> None:
    for name, site in results.sites.items():
        alone = "" if site.dice_local is None else f", alone {site.dice_local:.3f}"
        click.echo(f"{name}: test Dice {site.dice or 0.0:.3f}{alone}")
    for name, unseen in results.unseen.items():
        click.echo(f"{name}: test Dice {unseen.dice:.3f} with the shared model, never trained on")
    click.echo(f"{results.rounds} rounds in {results.seconds:.0f} s; see {out / 'report.html'}")
