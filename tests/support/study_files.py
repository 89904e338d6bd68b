"""The files of a small study, over sites whose images are empty files: nobody opens them."""

import json
from pathlib import Path

from fedoap.study.config import Study, load_study

BASE = """
[federation]
federation = "f"
network = { width = 8, depth = 2 }
data = { size = [32, 32] }
[sites.a.data]
datalist = "a.json"
[sites.b.data]
datalist = "b.json"
modality = "ct"
[unseen.c.data]
datalist = "c.json"
"""


def write_study(folder: Path, base: str, text: str, cases: int = 6) -> Study:
    """Return the study of this text, over sites with so many patients of two cases each."""
    folder.mkdir(exist_ok=True)
    for name in "abc":
        rows = []
        for number in range(cases):
            for part in "xy":
                row = {"image": f"{name}{number}{part}.png", "label": f"{name}{number}{part}-m.png"}
                rows.append({**row, "patient": f"somebody {number}"})
                for file in row.values():
                    (folder / file).touch()
        lists = {"training": rows[:-4], "validation": rows[-4:-2], "test": rows[-2:]}
        (folder / f"{name}.json").write_text(json.dumps(lists))
    (folder / "simulate.toml").write_text(base)
    (folder / "study.toml").write_text(text)
    return load_study(folder / "study.toml")
