"""`fastdmd.pretrain --init`: what goes on from a network is that network's, and says so."""

import dataclasses
import json

from fastdmd import pretrain
from fastdmd.networks.weights import save_network
from tests.helpers.networks import SMALL, make_network
from tests.helpers.tiny_runs import refuses


def test_another_objective_is_refused_and_not_left_out(tmp_path, capsys):
    flow = tmp_path / "flow.safetensors"
    network = make_network(dataclasses.replace(SMALL, dynamics="flow", sigma_data=0.4))
    save_network(flow, network, kind="teacher")
    for init, options in (
        ("mnist", ["--dynamics", "flow"]),
        ("mnist", ["--sigma-data", "0.4"]),
        (str(flow), ["--sigma-data", "0.6"]),
    ):
        flag, value = options
        expected = f"expected {flag} .*, as --init was trained, got {value}"
        refuses(pretrain, ["--init", init, *options, "--dry-run"], expected, capsys)
    for options in ([], ["--dynamics", "flow"], ["--sigma-data", "0.4", "--dynamics", "flow"]):
        pretrain.main(["--init", str(flow), *options, "--dry-run"])
        told = json.loads(capsys.readouterr().out)
        assert (told["objective"]["dynamics"], told["objective"]["sigma_data"]) == ("flow", 0.4)
        architecture = {
            name: told["architecture"][name] for name in ("model_channels", "channel_multipliers", "patch_size")
        }
        assert architecture == {"model_channels": 8, "channel_multipliers": [1, 2], "patch_size": 2}
