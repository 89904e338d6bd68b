"""A request for a certificate, put to the coordinator outside a node's loop and repeated until it is answered."""

import time
from dataclasses import dataclass

import zmq

from fedoap.errors import RefusedError
from fedoap.identity import Certificate, KeyPair
from fedoap.messages import Enrol, Enrolled, Refuse, Rotate
from fedoap_node.link import Address, Link, News

ANSWER_SECONDS = 30.0
REPEAT_SECONDS = 2.0
FAILURES = 4
"""This many failed handshakes are no accident."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked for, and what to say where no certificate comes."""

    request: Enrol | Rotate
    subject: str
    """Whose request it is, for a refusal."""
    stranger: str
    """For an answer that does not prove to come from the coordinator."""
    unknown_key: RefusedError
    """For a coordinator that does not know the key under which is asked."""
    patience: int = FAILURES
    """How often the key may be refused: a coordinator may not have heard yet of an invitation it has just issued."""
    advice: str = ""
    """Added where nobody answers."""


def ask(address: Address, keys: KeyPair, question: Question) -> Certificate:
    """Return the certificate that the coordinator answers with; its content is not looked at.

    Raises:
        RefusedError: the coordinator refused, or cannot be reached.
        IdentityError: its answer is no certificate.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = Link(context, address, keys)
    try:
        return _answer(link, address.endpoint, question)
    finally:
        link.close()
        context.term()


def _answer(link: Link, endpoint: str, question: Question) -> Certificate:
    poller = zmq.Poller()
    poller.register(link.socket, zmq.POLLIN)
    poller.register(link.monitor, zmq.POLLIN)
    deadline, repeat_at, failures = time.monotonic() + ANSWER_SECONDS, 0.0, 0
    while (now := time.monotonic()) < deadline:
        poller.poll(100)
        for news in link.news(now):
            failures += news in (News.STRANGER, News.KEY_REFUSED, News.PROXY)
            _judge(news, failures, link.fault, question)
        if (certificate := _heard(link, question)) is not None:
            return certificate
        link.dial(now)
        if link.up and now >= repeat_at and link.send(question.request):
            repeat_at = now + REPEAT_SECONDS
    what = "does not answer the request" if link.up else "nobody answers; is the coordinator running and the port open?"
    raise RefusedError("unreachable", f"{endpoint}: {what} (waited {ANSWER_SECONDS:.0f} s){question.advice}")


def _judge(news: News, failures: int, fault: str, question: Question) -> None:
    """Return unless the handshake has failed too often."""
    match news:
        case News.KEY_REFUSED if failures >= question.patience:
            raise question.unknown_key
        case News.PROXY if failures >= FAILURES:
            raise RefusedError("proxy", fault)
        case News.STRANGER if failures >= FAILURES:
            raise RefusedError("stranger", question.stranger)
        case _:
            return


def _heard(link: Link, question: Question) -> Certificate | None:
    for answer in link.receive():
        match answer:
            case (Enrolled(), body):
                return Certificate.unpack(bytes(body))
            case (Refuse(code, reason, _), _):
                raise RefusedError(code, f"{question.subject}: refused by the coordinator: {reason}")
            case _:
                continue
    return None
