"""The first ten images of several files of sample.py --npz, a row of each:

    python assets/runs/samples.py sheet.png "mage=mage.npz" "addp, Halton's order=addp.npz"
"""
import pathlib
import sys

import numpy
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import unified


def main(out, *rows):
    names, files = zip(*(row.split("=", 1) for row in rows))
    x = numpy.concatenate([numpy.load(file)["arr_0"][:10] for file in files])               # (n, S, S, 3)
    x = torch.from_numpy(x).movedim(-1, 1) / 255
    unified.image_grid(x, columns=10, min_side=640, rows=names).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
