"""`fedoap-node`: run a site's daemon, join a federation, say how a site stands."""

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import cast

import click
from pydantic import ValidationError

import fedoap
from fedoap.config import Modality, ModelRecord, load_site
from fedoap.errors import DiskError, FedoapError, StorageError
from fedoap.heap import keep_freed_memory
from fedoap.identity import fingerprint
from fedoap.sitefolder import SiteFolder, find_site
from fedoap_node.daemon import Node
from fedoap_node.join import join
from fedoap_node.journal import Journal, one_line
from fedoap_node.membership import Membership
from fedoap_node.ready import check_data
from fedoap_node.state import SiteState, lock_state, running
from fedoap_node.tunnel import Proxy

HOME_HELP = "Folder that holds the sites' folders; else $FEDOAP_HOME, ./.fedoap or the user's data folder."
home_option = click.option("--home", type=click.Path(file_okay=False, path_type=Path), help=HOME_HELP)
site_option = click.option("--site", help="The site's name.")


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@site_option
@home_option
@click.option("--exit-when-finished", is_flag=True, help="End when the federation has finished or stopped.")
@click.version_option(fedoap.__version__, prog_name="fedoap-node")
@click.pass_context
def cli(context: click.Context, site: str | None, home: Path | None, exit_when_finished: bool) -> None:
    """Keep a hospital's part in a federation: dial out, train here, send shared weights only.

    \b
    Example:
      fedoap-node join fedoap1-... --data datalist.json --modality ct
      fedoap-node --site hospital_a
    """  # noqa: D301 - click wants the control character
    if context.invoked_subcommand is not None:
        return
    if site is None:
        raise click.UsageError("name the site: fedoap-node --site hospital_a")
    serve(find_site(site, home), exit_when_finished)


@cli.command("join")
@click.argument("token")
@home_option
@click.option(
    "--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The site's datalist (JSON)."
)
@click.option("--modality", type=click.Choice(["mr", "ct", "ultrasound", "photo"]), default="mr", show_default=True)
@click.option("--proxy", help="Dial out through http://[USER:PASSWORD@]HOST:PORT (CONNECT) or socks5://...")
@click.pass_context
def join_command(
    context: click.Context, token: str, *, home: Path | None, data: Path | None, modality: str, proxy: str | None
) -> None:
    """Join a federation with the one-time TOKEN that its operator sent.

    \b
    Example:
      fedoap-node join fedoap1-AbC... --data /data/liver/datalist.json --modality ct
    """  # noqa: D301 - click wants the control character
    home = home or context.find_root().params["home"]
    joined = join(token, home, data, cast(Modality, modality), proxy)
    name = joined.folder.name
    click.echo(f"{name} has joined {joined.federation}")
    click.echo(f"  this site's key      {joined.site_fingerprint}")
    click.echo(f"  the federation's key {joined.federation_fingerprint}")
    click.echo("  compare both with the operator: `fedoap-coordinator sites` shows the same")
    click.echo(f"  folder               {joined.folder.path}")
    todo = "" if data else f"name the data in {joined.folder.config}, then "
    click.echo(f"Next: {todo}{next_command(name, home)}")


def next_command(site: str, home: Path | None) -> str:
    """Return the command that starts a site's node, as a shell reads it."""
    return shlex.join(["fedoap-node", "--site", site, *(["--home", str(home)] if home else [])])


@cli.command("status")
@site_option
@home_option
@click.pass_context
def status_command(context: click.Context, site: str | None, home: Path | None) -> None:
    """Say how a site stands: whether its node runs, what it did last, which model it has."""
    folder = _site(context, site, home, "status")
    member = Membership.read(folder)
    click.echo(f"site        {member.site}  key {fingerprint(member.signing.public)}")
    click.echo(f"federation  {member.federation}  key {fingerprint(member.federation_key)}  at {member.endpoint}")
    click.echo(f"folder      {folder.path}")
    click.echo(f"node        {_runs(folder)}")
    click.echo(f"last event  {_last_event(folder)}")
    click.echo(f"model       {_model(folder)}")


@cli.command("rotate")
@site_option
@home_option
@click.pass_context
def rotate_command(context: click.Context, site: str | None, home: Path | None) -> None:
    """Give a site new keys, vouched for by its old ones; a node that runs takes them up, its worker goes on."""
    from fedoap_node.rotation import rotate

    folder = _site(context, site, home, "rotate")
    proxy = load_site(folder.config).network.proxy
    member = rotate(folder, Proxy.parse(proxy) if proxy else None)
    click.echo(f"{member.site} has new keys in {member.federation}")
    click.echo(f"  this site's key      {fingerprint(member.signing.public)}")
    click.echo("  compare it with the operator: `fedoap-coordinator sites` shows the same")


@cli.command("doctor")
@site_option
@home_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, the form that programs read.")
@click.pass_context
def doctor_command(context: click.Context, site: str | None, home: Path | None, as_json: bool) -> None:
    """Find out what keeps a site from its work: line, key, disk, GPU, data. Exit code 1 if anything does.

    A node that runs is not disturbed.
    """
    from fedoap_node.doctor import examine

    folder, findings = _site(context, site, home, "doctor"), []
    for finding in examine(folder):
        findings.append(finding)
        if not as_json:
            click.echo(f"{finding.verdict:<8} {finding.check:<8} {finding.text}")
    well = all(finding.verdict != "wrong" for finding in findings)
    if as_json:
        click.echo(json.dumps({"site": folder.name, "well": well, "findings": list(map(asdict, findings))}, indent=1))
    sys.exit(0 if well else 1)


def serve(folder: SiteFolder, exit_when_finished: bool) -> None:
    """Run the site's daemon; return when it has ended in good order.

    Raises:
        FedoapError: something that the site's operator can set right.
    """
    os.umask(0o077)
    keep_freed_memory()
    config = load_site(folder.config)
    check_data(config, folder)
    member = Membership.read(folder)
    lock = lock_state(folder)
    journal = Journal(folder.log, member.site)
    try:
        with closing(journal), _end_told(journal):
            said = f"fedoap-node {fedoap.__version__} for {member.federation}"
            journal.note("started", said, software=fedoap.__version__)
            state = SiteState(folder, lock)
            Node(member, state, config, journal).run(exit_when_finished=exit_when_finished)
    except (StorageError, OSError) as error:
        raise DiskError(_words(error)) from error


@contextmanager
def _end_told(journal: Journal) -> Iterator[None]:
    """Log how the block ended, as far as the disk lets us: the log may lie on the one that is full."""
    try:
        yield
    except (FedoapError, OSError) as error:
        with suppress(OSError):
            journal.note("ended", "ended by an error", level="error", reason=_words(error))
        raise
    journal.note("ended", "ended in good order")


def main() -> None:
    """Run the command line; a fault that a user can set right is one line and exit code 2, or 1 if waiting may help."""
    try:
        cli.main(prog_name="fedoap-node", standalone_mode=False)
    except click.ClickException as error:
        sys.exit(_complain(error.format_message()))
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except DiskError as error:
        sys.exit(_complain(str(error), code=1))
    except FedoapError as error:
        sys.exit(_complain(str(error)))
    except OSError as error:
        sys.exit(_complain(_words(error)))


def _site(context: click.Context, site: str | None, home: Path | None, command: str) -> SiteFolder:
    before = context.find_root().params  # `fedoap-node --site S status` is as good as `fedoap-node status --site S`
    site, home = site or before["site"], home or before["home"]
    if site is None:
        raise click.UsageError(f"name the site: fedoap-node {command} --site hospital_a")
    return find_site(site, home)


def _complain(text: str, code: int = 2) -> int:
    click.echo(f"fedoap-node: {one_line(text)}", err=True)
    return code


def _words(error: FedoapError | OSError) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'disk'}: the system refused: {error.strerror}"
    return str(error)


def _runs(folder: SiteFolder) -> str:
    process = running(folder)
    return f"runs, process {process}" if process else "does not run"


def _last_event(folder: SiteFolder) -> str:
    try:
        with folder.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
            row = json.loads(log.read().splitlines()[-1])
        when = f"{row.pop('time')} {row.pop('event')}"
    except (OSError, IndexError, ValueError, KeyError, TypeError, AttributeError):  # a log that was cut or altered
        return "none"
    rest = " ".join(f"{key}={value}" for key, value in row.items() if key != "level")
    return one_line(f"{when} {rest}")


def _model(folder: SiteFolder) -> str:
    try:
        record = ModelRecord.model_validate_json(folder.model_record.read_bytes())
    except (OSError, ValidationError):
        return "none yet"
    return f"of round {record.round}, {folder.model_record}"


if __name__ == "__main__":
    main()
