"""A plan as a reader sees it: one table, then a line for each thing to decide on."""

from rich.table import Table

from nvvl.quantize.estimate import Estimate
from nvvl.quantize.limits import Limits, parse_memory
from nvvl.quantize.plan import Plan

_GIB = 2**30


def plan_table(plan: Plan) -> Table:
    """Build the table of module groups, schemes, parameters and bytes."""
    table = Table("modules", "scheme")
    for column in ("tensors", "parameters", "bytes before", "bytes after"):
        table.add_column(column, justify="right")
    for group in plan.groups:
        numbers = (group.num_tensors, group.parameters, group.source_bytes, group.output_bytes)
        table.add_row(group.name, group.scheme, *(f"{number:,}" for number in numbers))
    table.add_section()
    totals = (
        sum(group.num_tensors for group in plan.groups),
        sum(group.parameters for group in plan.groups),
        sum(group.source_bytes for group in plan.groups),
        sum(group.output_bytes for group in plan.groups),
    )
    table.add_row("all", plan.recipe.name, *(f"{total:,}" for total in totals))
    return table


def plan_lines(plan: Plan, limits: Limits | None = None) -> list[str]:
    """Say rules, sizes, estimates and what can be split, a line each.

    Args:
        plan: What would be done.
        limits: What ``--memory`` allows; None where nothing was said.
    """
    lines = [f"note: {note}" for note in plan.source.notes]
    for match in plan.rules:
        layers = f" in layers {list(match.rule.layers)}" if match.rule.layers else ""
        lines.append(
            f"rule {match.rule.target}{layers} -> {match.rule.format}: "
            f"matches {match.num_matched} linears, decides {match.num_decided}"
        )
    word = "about" if plan.source.notes else "exactly"
    estimate = plan.estimate
    lines += [
        f"weights: {word} {plan.weight_bytes:,} bytes ({plan.weight_bytes / _GIB:.2f} GiB) in "
        f"{len(plan.shards)} files",
        f"output: {word} {plan.output_bytes:,} bytes, and manifest.json of about "
        f"{plan.manifest_bytes:,}",
        f"memory: about {estimate.memory_bytes / 1e9:.1f} GB at peak, with {estimate.assumed}"
        f"{_least_memory(estimate)}",
        *([] if limits is None else [_limits_line(estimate, limits)]),
        f"time: about {_format_seconds(estimate.seconds)} (rates {estimate.rates})",
        f"disk: up to {plan.disk_bytes:,} bytes while running, {plan.free_bytes:,} free here"
        f"{_missing_disk(plan)}",
    ]
    for num_gpus, faults in plan.tensor_parallel.items():
        lines.append(f"tensor parallel {num_gpus}: {'; '.join(faults) or 'every layer splits'}")
    return lines


def _limits_line(estimate: Estimate, limits: Limits) -> str:
    budget = limits.activation_bytes or 0
    on_disk = max(0, estimate.activation_bytes - budget)
    return (
        f"within --memory: {min(budget, estimate.activation_bytes) / 1e9:.1f} GB of items in "
        f"memory, {on_disk / 1e9:.1f} GB on disk; reading and writing "
        f"{'beside the work' if limits.overlap else 'between the blocks'}"
    )


def _missing_disk(plan: Plan) -> str:
    missing = plan.disk_bytes - plan.free_bytes
    return f": {missing:,} bytes short" if missing > 0 else ""


def _least_memory(estimate: Estimate) -> str:
    """Say from where on --memory helps, if it does."""
    least = _round_up(estimate.minimum_bytes)
    if parse_memory(least) >= estimate.memory_bytes:
        return ""
    return f"; --memory from {least} on takes less"


def _round_up(num_bytes: int) -> str:
    return f"{-(-num_bytes // 10**8) / 10:.1f}GB"


def _format_seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min"
