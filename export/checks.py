"""What a check of a written checkpoint says: passed, failed, or not checked, and why.

A check that could not run (no source given, logits skipped) is `None`, never passed: a report
reads "not checked" and a reader is not told that something was proved. Rules of the serving
contract and proofs of values share this form, so that a report is one list.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, TypeVar

_SERVERS = {"V": "vLLM", "T": "TensorRT-LLM", "S": "SGLang", "E": "Edge-LLM"}

# A report line names this many faults; the JSON report holds them all.
_MAX_NAMED = 6

Subject = TypeVar("Subject")


class NotCheckedError(Exception):
    """Raised inside a rule that lacks what it needs; its check then reads "not checked"."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check.

    Attributes:
        rule: Id of the rule (C1 to E5 of the serving contract, or a proof: A1, V1, H1, L1, L2).
        name: What is demanded, in a few words.
        passed: True, False, or None if it was not checked.
        detail: What was found; names every fault up to a handful, then counts.
        faults: Every fault, one line each, starting with the tensor, key or pattern it is about.
        servers: Servers the rule comes from; empty for proofs.
        silent: Whether a server would start and answer wrongly if this is broken.
    """

    rule: str
    name: str
    passed: bool | None
    detail: str
    faults: tuple[str, ...] = ()
    servers: tuple[str, ...] = ()
    silent: bool = False

    @property
    def status(self) -> str:
        """One of ``passed``, ``failed`` and ``not checked``."""
        if self.passed is None:
            return "not checked"
        return "passed" if self.passed else "failed"

    def to_dict(self) -> dict[str, Any]:
        """Return the check as JSON-ready values."""
        return {**asdict(self), "status": self.status}


def judge(
    rule: str,
    name: str,
    faults: Sequence[str],
    *,
    note: str = "ok",
    servers: tuple[str, ...] = (),
    silent: bool = False,
) -> Check:
    """Build the check that these faults amount to; none means passed.

    Args:
        rule: id of the rule.
        name: what is demanded.
        faults: one line each.
        note: the detail of a passed check.
        servers: servers the rule comes from.
        silent: whether breaking it goes unnoticed.
    """
    return Check(
        rule=rule,
        name=name,
        passed=not faults,
        detail=_name_some(faults) if faults else note,
        faults=tuple(faults),
        servers=servers,
        silent=silent,
    )


def not_checked(rule: str, name: str, reason: str) -> Check:
    """Build the check of something that was not looked at."""
    return Check(rule=rule, name=name, passed=None, detail=reason)


@dataclass(frozen=True, kw_only=True)
class Rule(Generic[Subject]):
    """A function that lists faults, with the id and the servers it speaks for."""

    rule: str
    name: str
    servers: tuple[str, ...]
    silent: bool
    find_faults: Callable[[Subject], Sequence[str]]

    def __call__(self, subject: Subject) -> Check:
        """Apply the rule."""
        try:
            faults = self.find_faults(subject)
        except NotCheckedError as reason:
            check = not_checked(self.rule, self.name, str(reason))
            return replace(check, servers=self.servers, silent=self.silent)
        return judge(self.rule, self.name, faults, servers=self.servers, silent=self.silent)


def rule(
    rule_id: str, name: str, *, servers: str, silent: bool = False
) -> Callable[[Callable[[Subject], Sequence[str]]], Rule[Subject]]:
    """Turn a function that lists faults into a `Rule`.

    Args:
        rule_id: id in the serving contract.
        name: what is demanded, in a few words.
        servers: letters of the servers it comes from: V vLLM, T TensorRT-LLM, S SGLang,
            E Edge-LLM.
        silent: whether a server starts and answers wrongly if it is broken.
    """

    def wrap(find_faults: Callable[[Subject], Sequence[str]]) -> Rule[Subject]:
        return Rule(
            rule=rule_id,
            name=name,
            servers=tuple(_SERVERS[letter] for letter in servers),
            silent=silent,
            find_faults=find_faults,
        )

    return wrap


def summarize(server: str, checks: Sequence[Check]) -> list[str]:
    """Say which rules of a server hold: how many, each that fails, those not checked.

    Args:
        server: as the checks name it; those that do not concern it are passed over.
        checks: of all rules.
    """
    concerned = [check for check in checks if server in check.servers]
    failed = [check for check in concerned if check.passed is False]
    unchecked = [check.rule for check in concerned if check.passed is None]
    held = len(concerned) - len(failed) - len(unchecked)
    lines = [f"{server}: {held} of {len(concerned)} rules hold"]
    lines += [f"FAILS {check.rule} ({check.name}): {check.detail}" for check in failed]
    if unchecked:
        lines.append(f"not checked: {', '.join(unchecked)}")
    return lines


def _name_some(faults: Sequence[str]) -> str:
    named = "; ".join(faults[:_MAX_NAMED])
    more = len(faults) - _MAX_NAMED
    return f"{named}; and {more} more" if more > 0 else named
