"""`fedoap-coordinator`: run a federation, invite and revoke sites, say how it stands and what came out."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click

import fedoap
from fedoap.config import FederationConfig, load_federation
from fedoap.errors import ConfigError, DiskError, FedoapError
from fedoap.identity import SECRET_BYTES, fingerprint, read_private, signing_keys
from fedoap.strategies import check_federated
from fedoap_coordinator import reports
from fedoap_coordinator.enrolment import SECONDS_PER_HOUR, Enrolment, check_site
from fedoap_coordinator.folder import Keys, check_keys, is_local, open_ledger, prepare, running
from fedoap_coordinator.ledger import Ledger

HOURS_PER_YEAR = 8760

config_option = click.option(
    "--config", "config_path", type=click.Path(dir_okay=False, path_type=Path), help="The federation's fed.toml."
)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@config_option
@click.option("--exit-when-finished", is_flag=True, help="End when the last round is over and the sites know.")
@click.version_option(fedoap.__version__, prog_name="fedoap-coordinator")
@click.pass_context
def cli(context: click.Context, config_path: Path | None, exit_when_finished: bool) -> None:
    """Coordinate a federation: tell sites what to train, merge what they send, keep the shared model.

    \b
    Example:
      fedoap-coordinator invite hospital_a --config fed.toml
      fedoap-coordinator --config fed.toml
    """  # noqa: D301 - click wants the control character
    if context.invoked_subcommand is None:
        from rich.console import Console as Terminal

        from fedoap_coordinator.service import run

        run(_load(context, config_path), Terminal(), exit_when_finished=exit_when_finished)


@cli.command()
@click.argument("site")
@config_option
@click.option("--valid-hours", type=float, default=72, show_default=True, help="At most a year.")
@click.pass_context
def invite(context: click.Context, site: str, config_path: Path | None, valid_hours: float) -> None:
    """Print a one-time token with which SITE can join; give it to nobody else."""
    config, now = _load(context, config_path), time.time()
    if not 0 < valid_hours <= HOURS_PER_YEAR:  # nan is not either
        raise ConfigError(f"--valid-hours is {valid_hours:g}, but must be above 0 and at most {HOURS_PER_YEAR}")
    with _opened(config) as (keys, ledger):
        if ledger.roster().active(site):
            click.echo(f"{site} is enrolled already; joining with this token replaces its keys", err=True)
        expires = int(now + valid_hours * SECONDS_PER_HOUR)
        token = Enrolment(config, ledger, keys).invite(site, expires, now, os.urandom(SECRET_BYTES))
    if config.coordinator.advertise is None and is_local(token.endpoint):
        text = "only this machine reaches; set coordinator.advertise to the address that sites dial, and invite again"
        click.echo(f"the token leads to {token.endpoint}, which {text}", err=True)
    click.echo(token.encode())


@cli.command()
@click.argument("site")
@config_option
@click.pass_context
def revoke(context: click.Context, site: str, config_path: Path | None) -> None:
    """Shut SITE out, now: its key opens nothing any more, its open tokens are void."""
    config = _load(context, config_path)
    with _opened(config) as (_, ledger):
        if not ledger.revoke(site, time.time()):
            check_site(config, site)
            raise ConfigError(f"{site}: has neither joined nor an open invitation, so there is nothing to revoke")
    click.echo(f"{site} is revoked; to let it in again: fedoap-coordinator invite {site}")


@cli.command()
@config_option
@click.pass_context
def sites(context: click.Context, config_path: Path | None) -> None:
    """List the sites, their keys' fingerprints and open invitations."""
    config = _load(context, config_path)
    with _opened(config) as (keys, ledger):
        click.echo(f"federation {config.federation}, key {fingerprint(keys.signing.public)}")
        for line in reports.site_lines(config, ledger, time.time()):
            click.echo(line)


@cli.command()
@config_option
@click.pass_context
def status(context: click.Context, config_path: Path | None) -> None:
    """Say whether the coordinator runs, what is under way, and who is waited for."""
    config = _load(context, config_path)
    with _opened(config) as (_, ledger):
        for line in reports.status_lines(config, ledger, running(config.coordinator.state)):
            click.echo(line)


@cli.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, the form that programs read.")
@click.pass_context
def results(context: click.Context, config_path: Path | None, as_json: bool) -> None:
    """Print every exchange: how it ended, who took part, with what figures."""
    config = _load(context, config_path)
    with _opened(config) as (_, ledger):
        run = reports.results(config, ledger)
    click.echo(json.dumps(run, indent=1) if as_json else "\n".join(reports.result_lines(run)))


@cli.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@config_option
@click.pass_context
def export(context: click.Context, folder: Path, config_path: Path | None) -> None:
    """Write the newest shared model and bank into FOLDER, with the model.json that `fedoap predict` reads."""
    config = _load(context, config_path)
    with _opened(config) as (_, ledger):
        record = reports.export(config, ledger, folder)
    click.echo(f"{folder / 'model.json'}: shared model after round {record.round}")


@cli.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, the form that programs read.")
@click.pass_context
def verify(context: click.Context, config_path: Path | None, as_json: bool) -> None:
    """Check the chain of rounds, the ledger and every blob, and compute results anew; exit code 1 if one is broken."""
    from fedoap_coordinator.verify import verify as verdicts

    config = _load(context, config_path)
    key = signing_keys(read_private(config.coordinator.state / "keys" / "federation.key")).public
    found = []
    for verdict in verdicts(config.coordinator.state, config.federation, key):
        found.append(verdict)
        if not as_json:
            click.echo(verdict.line)
    counts = Counter(verdict.finding for verdict in found[1:])
    is_sound = all(verdict.finding != "BROKEN" for verdict in found)
    if as_json:
        click.echo(json.dumps({"sound": is_sound, "found": [asdict(verdict) for verdict in found]}, indent=1))
    else:
        told = ", ".join(f"{count} {finding}" for finding, count in counts.items()) or "none"
        click.echo(f"exchanges: {told}; signed by the federation's key {fingerprint(key)}")
    if not is_sound:
        sys.exit(1)


@cli.command()
@config_option
@click.option("--site", help="Only this site.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, the form that programs read.")
@click.pass_context
def audit(context: click.Context, config_path: Path | None, site: str | None, as_json: bool) -> None:
    """List every blob that entered from a site, was refused, or left for it."""
    from fedoap_coordinator.audit import audit as blobs_by_site
    from fedoap_coordinator.audit import audit_lines

    found = blobs_by_site(_load(context, config_path), site)
    click.echo(json.dumps(found, indent=1) if as_json else "\n".join(audit_lines(found)))


def main() -> None:
    """Run the command line; what a user can set right is one line and exit code 2, 1 if waiting may help."""
    try:
        cli.main(prog_name="fedoap-coordinator", standalone_mode=False)
    except click.ClickException as error:
        sys.exit(_complain(error.format_message()))
    except click.Abort:
        sys.exit(130)
    except DiskError as error:
        sys.exit(_complain(str(error), code=1))
    except FedoapError as error:
        sys.exit(_complain(str(error)))
    except OSError as error:
        sys.exit(_complain(f"{error.filename or 'disk'}: the system refused: {error.strerror}"))


def _complain(text: str, code: int = 2) -> int:
    one_line = " ".join(text.split())
    click.echo(f"fedoap-coordinator: {one_line}", err=True)
    return code


def _load(context: click.Context, path: Path | None) -> FederationConfig:
    chosen = path or context.find_root().params.get("config_path")
    if chosen is None:
        raise click.UsageError("name the configuration: --config fed.toml")
    config = load_federation(chosen)
    try:
        check_federated(config.strategy)
    except ConfigError as error:
        raise ConfigError(f"{chosen}: {error}") from None
    return config


@contextmanager
def _opened(config: FederationConfig) -> Iterator[tuple[Keys, Ledger]]:
    keys = prepare(config.coordinator.state)
    with open_ledger(config) as ledger:
        check_keys(ledger, keys)
        yield keys, ledger
