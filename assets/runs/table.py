"""The README's table of CIFAR-10, both of results.md, and loss curves, made of the logs in this folder:

    python assets/runs/table.py                     the three tables in Markdown; draws losses.png
    python assets/runs/table.py out/cifar10-mage    first takes the logs of this run, or of several, thinned
"""
import json
import pathlib
import statistics
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import PIL.Image

import train

ORDER = ["mage", "mage-c", "mage-e", "addp", "umd", "mae", "maskdit", "dit", "adm"]
# The corner of each table; title of a column: how its figures are written.
TABLES = {
    "features": {"ridge": "{:.1%}", "untrained": "{:.1%}", "best layer": "{:.1%}",
                 "untrained there": "{:.1%}", "20-NN": "{:.1%}", "linear": "{:.1%}", "fine-tuned": "{:.1%}",
                 "from scratch": "{:.1%}"},
    "samples, cost": {"FD-local": "{:.1f}", "precision": "{:.1%}", "recall": "{:.1%}", "steps": "{}",
                      "CPU minutes": "{:.0f}", "images/s": "{:.0f}"}}
# The README's has of both what a reader needs first.
BRIEF = ["ridge", "untrained", "20-NN", "fine-tuned", "FD-local", "CPU minutes"]
TABLES["CIFAR-10"] = {title: form for columns in [*TABLES.values()] for title, form in columns.items()
                      if title in BRIEF}

# Column of a head, with all labels or with this fraction of them.
PROBES = {("ridge", None): "best layer", ("knn", None): "20-NN", ("linear", None): "linear",
          ("finetune", 0.1): "fine-tuned"}


def read(path):
    """Rows of a .jsonl file, [] if there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rounded(v):
    """A row with five digits of every float."""
    if isinstance(v, dict):
        return {k: rounded(w) for k, w in v.items()}
    return float(f"{v:.5g}") if isinstance(v, float) else v


def thinned(rows):
    """At most 40 of them, the last one included."""
    return rows[::-1][::-(-len(rows) // 40) or 1][::-1]


def take(run):
    """Put some rows of each stage of a run's log.jsonl here, and all of its reports and probes."""
    rows = read(run / "log.jsonl")
    losses = [row for stage in ("tokenizer", "model") for kind in ("loss", "held_out")
              for row in thinned([r for r in rows if r["stage"] == stage and kind in r])]
    names = ("stage", "step", "loss", "masked", "held_out", "images_per_second")
    kept = [{k: row[k] for k in names if k in row} for row in losses]
    kept += [row for row in rows if row["stage"] == "report"] + read(run / "probe.jsonl")
    (HERE / f"{run.name}.jsonl").write_text("".join(json.dumps(rounded(row)) + "\n" for row in kept))


def figures(rows):
    """{title of a column: figure} of a run's rows; of several figures the last."""
    rates = sorted(row["images_per_second"] for row in rows if row.get("stage") == "model" and "loss" in row)
    steps = max(row["step"] for row in rows if row.get("stage") == "model")
    found = {"images/s": rates[len(rates) * 9 // 10], "steps": steps}     # other work slowed some rows
    for row in rows:
        if row.get("stage") == "report":
            found |= {"CPU minutes": row.get("cpu_minutes"), "ridge": row["probe"]["features"],
                      "untrained": row["probe"]["the same network untrained"]}
        elif row.get("head") == "samples":
            found |= {"FD-local": row["fd_local"], "precision": row["precision"], "recall": row["recall"]}
        elif title := PROBES.get((row.get("head"), row.get("labels"))):
            found[title] = row["top1"]                          # ridge: of the place that --sweep has chosen
            if twin := {"fine-tuned": "from scratch", "best layer": "untrained there"}.get(title):
                found[twin] = row["untrained"]
    return found


def baselines(logs):
    """{name: {title of a column: figure}} of raw pixels and of the anchors of samples, the same for all, and
    of what ladder.py found."""
    rows = next(iter(logs.values()))
    pixels = {"ridge": next(r["probe"]["raw pixels"] for r in rows if r.get("stage") == "report")}
    pixels |= {title: r["pixels"] for r in rows if (title := PROBES.get((r.get("head"), r.get("labels"))))
               and title in ("20-NN", "linear")}
    ladder = {r["name"]: {"ridge": r["top1"]} for r in read(HERE / "ladder.jsonl")}
    anchors = next((r["anchors"] for r in rows if r.get("head") == "samples"), {})
    anchors = {name: {"FD-local": r["fd_local"], **r} for name, r in anchors.items()}
    return {"raw pixels": pixels, **ladder, **anchors}


def table(corner, columns, found):
    """Lines of a table in Markdown: a row for each of {name: figures()} that has any of its columns."""
    yield f"| {corner} | " + " | ".join(columns) + " |"
    yield "|" + "---|" * (1 + len(columns))
    for name, row in found.items():
        cells = {title: form.format(row[title]) if title in row else "" for title, form in columns.items()}
        if others := sorted(HERE.glob(f"cifar10-{name}-seed*.jsonl")) if "ridge" in columns else []:
            seeds = [row["ridge"], *(figures(read(path))["ridge"] for path in others)]
            cells["ridge"] = f"{statistics.mean(seeds):.1%} ± {100 * statistics.stdev(seeds):.1f}"
        if any(cells.values()):
            yield f"| {name} | " + " | ".join(cells.values()) + " |"


def tables(logs):
    """The three tables in Markdown."""
    found = {name: figures(rows) for name, rows in logs.items()} | baselines(logs)
    return ["\n".join(table(corner, columns, found)) for corner, columns in TABLES.items()]


def draw(logs):
    """losses.png: training and held-out loss of every method by step."""
    sheet = PIL.Image.new("RGB", (1800, 340 * -(-len(logs) // 3)), "white")
    for i, (name, rows) in enumerate(logs.items()):
        steps = [r for r in rows if r.get("stage") == "model"]
        curves = {kind: [(r["step"], r.get("masked", r[kind])) for r in steps if kind in r]
                  for kind in ("loss", "held_out")}
        chart = train.line_chart({kind: curve for kind, curve in curves.items() if curve}, name, (600, 340))
        sheet.paste(chart, (i % 3 * 600, i // 3 * 340))
    sheet.save(HERE / "losses.png")


def all_logs():
    """{method: rows} of the logs in this folder."""
    logs = {name: read(HERE / f"cifar10-{name}.jsonl") for name in ORDER}
    return {name: rows for name, rows in logs.items() if rows}


if __name__ == "__main__":
    for run in sys.argv[1:]:
        take(pathlib.Path(run))
    logs = all_logs()
    print("\n\n".join(tables(logs)))
    draw(logs)
