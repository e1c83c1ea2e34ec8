"""The numbers as a table, with the targets beside them."""

from __future__ import annotations

from typing import Any

# Share of the floor that a direct run is to reach on PostgreSQL with fsync on, by threads.
OF_FLOOR = {1: 0.5, 8: 0.4}
LATENCY_MS = 5.0
REPLAY_US = 30.0


def table(found: dict[str, Any]) -> str:
    facts = dict(found["facts"])
    database = facts.pop("database")
    lines = [
        "",
        f"{database}: {', '.join(f'{name} {value}' for name, value in facts.items())}",
        "",
        f"{'':40}{'ms each':>9}{'steps/s':>9}   {'same statements':>20}   {'plain rows':>20}",
        f"{'':40}{'':>9}{'':>9}   {'ms':>9}{'of floor':>11}   {'ms':>9}{'of floor':>11}",
    ]
    for row in found["compared"]:
        steps = f"{row['steps_per_second']:,.0f}" if row["steps_per_second"] else ""
        lines.append(
            f"{row['what']:40}{row['ms']:9.2f}{steps:>9}   {row['floor_ms']:9.2f}{row['of_floor']:11.2f}"
            f"   {row['plain_ms']:9.2f}{row['of_plain']:11.2f}   {judged(row, database)}".rstrip()
        )
    replay, drain, latency = found["replay"], found["drain"], found["latency"]
    lines += [
        "",
        f"{'a recorded step replays in':40}{replay['us']:9.1f} µs   {met(replay['us'], REPLAY_US, 'µs')}",
        f"{'  with the claim and the SELECT':40}{replay['us_with_select']:9.1f} µs",
        f"{'start() to the first step, idle worker':40}{latency['p50_ms']:9.2f} ms p50"
        f"   {met(latency['p50_ms'], LATENCY_MS, 'ms')}",
        f"{'':40}{latency['p95_ms']:9.2f} ms p95, {latency['p99_ms']:.2f} ms p99, of {latency['starts']} starts",
        f"{'one worker process':40}{drain['runs_per_second']:9,.0f} runs/s"
        f"   ({drain['runs']:,} runs of one step in {drain['seconds']:.2f} s)",
    ]
    return "\n".join(lines)


def judged(row: dict[str, Any], database: str) -> str:
    """The target of a direct run of non-atomic steps. There is one on PostgreSQL."""
    if not database.startswith("PostgreSQL") or "atomic" in row["what"] or not row["steps_per_second"]:
        return ""
    target = OF_FLOOR[row["threads"]]
    return f"target {target:g}: {'met' if row['of_floor'] >= target else 'not met'}"


def met(value: float, limit: float, unit: str) -> str:
    return f"target {limit:g} {unit}: {'met' if value <= limit else 'not met'}"
