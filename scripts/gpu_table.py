"""Print the check.json of scripts/gpu_check.py as a section of docs/benchmarks.md.

python scripts/gpu_table.py runs/gpu-check/check.json
"""

import json
import sys
from pathlib import Path


def markdown(found):
    """Return the check as a section of docs/benchmarks.md."""
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
    card = found.get("card") or f"no GPU ({found.get('cpu', '?')}, {found.get('cores', '?')} cores)"
    if found.get("card"):
        card += f" ({found['total_bytes'] / 2**30:.1f} GiB, {found['free_bytes'] / 2**30:.1f} free), driver {found['driver']}"
    if found.get("emulated_gib"):
        card += f", {found['emulated_gib']} GiB of it"
    lines = [
        f"{found.get('date', '?')}, {card}, commit {found.get('commit', '?')}; {versions}. Random weights of the shape "
        f"{found.get('shape') or '?'}; medians of runs in turn; {found['minutes']} minutes.",
        "",
        f"    {found.get('command', '?')}",
        "",
    ]
    outside = found.get("outside_tested_range")
    if outside:
        lines += [f"Outside the tested range: {'; '.join(f'{name} {text}' for name, text in outside.items())}.", ""]
    lines += ["| | case | qlora | compared with | ratio | |", "|---|---|---|---|---|---|"]
    for row in found["rows"]:
        cells = [row["part"], row["case"], "", "", "", row["notes"]]
        if not row["ok"]:
            cells = [row["part"], row["case"], "**not done**" if row["measured"] is None else "", "", "", row["why"]]
        elif row["measured"] is not None:
            cells[2] = f"{number(row['measured'])} {row['unit']}{spread(row, 'qlora')}"
            cells[3] = ", ".join(
                f"{side} {number(value)}{spread(row, side)}" for side, value in row["compared"].items()
            )
            cells[4] = ", ".join(f"{row['measured'] / value:.2f}" for value in row["compared"].values() if value)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def number(value):
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(row, side):
    least, most = row["runs"].get(side, (None, None))
    return "" if least is None or least == most else f" ({number(least)}-{number(most)})"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
