"""Downloads that a restart of the site cut short."""

from bench import MODEL, MODEL_RAW, Bench
from fedoap.messages import Data, Get
from fedoap.protocol.events import DropPart, FinishPart, OpenPart, Say, Stopping


def test_a_download_goes_on_behind_what_the_disk_had_at_the_start() -> None:
    bench = Bench(partly={MODEL.id: 64})

    assert bench.give(bench.task()) == [OpenPart(MODEL.id, 152, 64, MODEL), Say(Get(MODEL.id, 64, 152))]
    bench.hear(Data(MODEL.id, 64), MODEL_RAW[64:128])
    assert FinishPart(MODEL.id, MODEL) in bench.hear(Data(MODEL.id, 128), MODEL_RAW[128:])


def test_a_download_that_is_here_to_the_last_byte_is_only_finished() -> None:
    bench = Bench(partly={MODEL.id: 152})

    assert bench.give(bench.task()) == [OpenPart(MODEL.id, 152, 152, MODEL), FinishPart(MODEL.id, MODEL)]


def test_a_download_stays_where_it_is_when_the_node_ends() -> None:
    """Planted bug: `Hand.drop` at the end."""
    bench = Bench()
    bench.give(bench.task())

    assert not [one for one in bench.handle(Stopping()) if isinstance(one, DropPart)]
