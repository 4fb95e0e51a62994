"""The tally of a run: what is bad is counted, and left out of the means."""

import math

import torch

from fastdmd.distill.tally import Tally


def test_tally_counts_what_is_bad_and_leaves_it_out_of_the_means():
    tally = Tally(("loss", "norm"), torch.device("cpu"))
    for loss, norm, left_out in ((1, 2, 0), (3, 4, 0.25), (math.nan, 1, 0), (1, math.inf, 0), (100, 100, 0.5)):
        tally.add(torch.tensor(float(loss)), torch.tensor(float(norm)), left_out=torch.tensor(left_out))
    assert tally.latest.tolist() == [100, 100]
    reading = tally.read()
    assert reading.means == {"loss": 2, "norm": 3}
    assert (reading.num_good, reading.num_bad, reading.num_bad_in_a_row, reading.left_out) == (2, 3, 3, 0.75)
    assert reading.num_watched == 0
    tally.add(torch.tensor(math.nan), torch.tensor(1.0))
    reading = tally.read()
    assert reading.means == {"loss": None, "norm": None} and reading.num_bad_in_a_row == 4
    tally.add(torch.tensor(5.0), torch.tensor(6.0))
    assert tally.read().num_bad_in_a_row == 0
