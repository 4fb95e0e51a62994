"""How networks are compiled, and what a turn as a CUDA graph rests on, as far as a CPU shows it."""

import contextlib
import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch

from fastdmd.distill.execution import CapturedTurn, CompiledNetwork, Compiler
from fastdmd.networks.unet import UNetConfig
from fastdmd.runs import distillation
from fastdmd.runs.config import TrainConfig
from tests.helpers.networks import make_network

TINY = UNetConfig(
    image_size=8, num_classes=3, model_channels=8, channel_multipliers=(1,), num_blocks=1, attention_resolutions=()
)


def inputs(batch_size):
    torch.manual_seed(0)
    return torch.randn(batch_size, 1, 8, 8), torch.rand(batch_size) + 0.1, torch.arange(batch_size) % 3


class Small(torch.nn.Module):
    """Somebody else's denoiser; a look at a value breaks its graph where it is asked to."""

    image_shape, num_classes, sigma_data, dynamics = (1, 8, 8), 0, 0.5, "flow"
    is_one_graph, foreign_name = False, "Small"

    def __init__(self, breaks=False, dtype=torch.float32):
        super().__init__()
        self.breaks, self.weight = breaks, torch.nn.Parameter(torch.full((), 3, dtype=dtype))

    def forward(self, x, sigma, class_labels=None):
        if self.breaks and sigma.sum().item() > 1e9:
            return x
        return x.to(self.weight.dtype) * self.weight / (1 + sigma)[:, None, None, None]


def test_networks_of_one_class_do_not_share_a_limit(traced):
    """Nine batch sizes of each, where one function may have eight."""
    networks = [Small(), Small().requires_grad_(False), Small(dtype=torch.bfloat16)]
    compiled = [CompiledNetwork(network, Compiler(None)) for network in networks]
    for batch_size in range(2, 11):
        for network, function in zip(networks, compiled, strict=True):
            assert torch.equal(function(*inputs(batch_size)), network(*inputs(batch_size)))
    assert traced() == 27
    with torch.no_grad():
        compiled[0](*inputs(10))
    assert traced() == 28
    for batch_size in (10, 2):  # nothing is compiled again
        compiled[0](*inputs(batch_size)).sum().backward()
    assert traced() == 28 and networks[0].weight.grad.abs() > 0


def test_copies_of_a_network_share_what_is_alike(traced):
    """As in DMD2: of five graphs two are the same, and each still computes with its own weights."""
    teacher, compiler = make_network(TINY), Compiler(None)
    generator, fake_score = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    for network, factor in ((generator, 2), (fake_score, 3)):
        with torch.no_grad():
            network.conv_out.weight.mul_(factor)
    for network, grad in (
        (generator, True),
        (teacher, False),
        (fake_score, False),
        (fake_score, True),
        (generator, False),
    ):
        with torch.set_grad_enabled(grad):
            result = CompiledNetwork(network, compiler)(*inputs(2))
            torch.testing.assert_close(result, network(*inputs(2)))
            assert result.requires_grad == grad
    assert traced() == 3


def test_networks_of_others_may_break_the_graph_and_ours_may_not(traced):
    network = Small(breaks=True)
    compiled = CompiledNetwork(network, Compiler(None))
    assert compiled.dynamics == "flow" and CompiledNetwork(make_network(TINY), Compiler(None)).dynamics == "edm"
    for batch_size in (2, 3):
        assert torch.equal(compiled(*inputs(batch_size)), network(*inputs(batch_size)))
    ours = make_network(TINY)
    ours.conv_out.register_forward_hook(lambda module, inputs, output: output if output.sum() > 0 else -output)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="branching"):
        CompiledNetwork(ours, Compiler(None))(*inputs(2))


def test_hooks_on_a_compiled_network_run(traced):
    network, sizes = make_network(TINY), []
    network.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    compiled = CompiledNetwork(network, Compiler(None))
    for batch_size in (2, 2, 3):
        compiled(*inputs(batch_size))
    assert sizes == [2, 2, 3]


@pytest.mark.parametrize("part", ["itself", "a layer"])
def test_hooks_on_one_of_several_copies_are_its_own(traced, part):
    """Whichever comes first, and when there is another one later."""
    compiler, networks = Compiler(None), [make_network(TINY) for _ in range(3)]
    layers = [network if part == "itself" else network.conv_out for network in networks]
    compiled = [CompiledNetwork(network, compiler) for network in networks]
    layers[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    for _ in range(2):
        for network, function in zip(networks, compiled, strict=True):
            assert torch.equal(function(*inputs(2)), network(*inputs(2)))
        layers[2].register_forward_hook(lambda module, inputs, output: 3 * output)
    assert traced() == 3  # one without hooks, one for each that has


def test_a_compiled_network_can_be_freed(traced):
    network = make_network(TINY).requires_grad_(True)
    compiled = CompiledNetwork(network, Compiler(None))
    compiled(*inputs(2)).sum().backward()
    codes = [weakref.ref(function) for function in compiled._compiler._forwards.values()]
    dead = weakref.ref(network), weakref.ref(network.conv_in.weight)
    del network, compiled
    gc.collect()
    assert [ref() for ref in (*dead, *codes)] == [None] * 3


CONFIG = TrainConfig(batch_size=4, dfake_gen_update_ratio=3, iterations=12)


def iterate(execution, device="cpu", steps=range(4), **changes):
    config = CONFIG.replace(execution=execution, precision="fp32", **changes)
    teacher = make_network(TINY).to(device)
    model, draws = distillation.build(config, teacher), distillation.make_draws(config, teacher, torch.device(device))
    losses = [model.iterate(step, draws)["loss_fake"] for step in steps]
    return model, losses


@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_a_model_is_freed_when_nobody_holds_it(traced, execution):
    """At once, without a collection: what it holds is most of a GPU."""
    gc.collect()
    model, _ = iterate(execution)
    dead = [
        weakref.ref(thing)
        for thing in (
            model,
            model.generator,
            model.generator_optimizer.ema_network,
            model.fake_score.conv_in.weight,
            model.buffers.x_gen,
        )
    ]
    gc.disable()
    try:
        del model
        assert [ref() for ref in dead] == [None] * 5
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_a_copy_goes_on_as_the_model_does(traced, execution, copied):
    """Both from the midst of images made ahead, and each with its own weights and buffers."""
    model, _ = iterate(execution, steps=range(2))
    model.executor.streams = (n for n in ())  # which no copy takes, as it takes no stream
    other = copied(model)
    model.executor.streams = None
    draws = distillation.make_draws(CONFIG, model.teacher, torch.device("cpu"))
    losses = [[one.iterate(step, draws)["loss_fake"].item() for step in range(2, 6)] for one in (model, other)]
    assert losses[0] == losses[1]
    for network in ("generator", "fake_score"):
        for own, others in zip(*(getattr(one, network).parameters() for one in (model, other)), strict=True):
            assert torch.equal(own, others)


def test_a_turn_by_itself_needs_an_iteration_before():
    model, _ = iterate("eager", steps=())
    for turn, name in ((model.generator_turn, "generator"), (model.guidance_turn, "guidance")):
        with pytest.raises(RuntimeError, match=f"expected an iteration before a {name} turn by itself, got none"):
            turn()


class Device:
    """What a captured turn asks of torch.cuda, as a list."""

    def __init__(self, monkeypatch):
        self.log, self.device = [], torch.device("cuda")
        for name in ("stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, functools.partial(self._block, name))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)

    @contextlib.contextmanager
    def _block(self, name, *arguments, **options):
        self.log.append(name)
        try:
            yield
        finally:
            self.log.append(f"end of {name}")

    def wait_stream(self, other):
        self.log.append("wait")

    def replay(self):
        self.log.append("replay")


def test_a_captured_turn_runs_twice_is_captured_and_replayed(monkeypatch):
    device = Device(monkeypatch)
    turn, calls = CapturedTurn(device, (0, 0)), []

    def run():
        calls.append(len(calls))
        if len(calls) in (2, 4):  # a warm-up call and a capture
            raise RuntimeError("the second and the fourth fail")

    logs = []
    for _ in range(7):
        device.log = []
        with contextlib.suppress(RuntimeError):
            turn(run)
        logs.append(device.log)
    eager = ["wait", "stream", "end of stream", "wait"]
    capture = ["stream", "graph", "end of graph", "end of stream"]
    assert logs == [eager, eager, eager, capture, [*capture, "replay"], ["replay"], ["replay"]]
    assert calls == [0, 1, 2, 3, 4]


def test_nothing_is_compiled_during_a_capture(monkeypatch, traced):
    """A turn whose third call is the first of its shape; one that its warm-up calls have compiled is captured."""
    network = CompiledNetwork(make_network(TINY), Compiler(None))
    late, turn = iter((2, 2, 3)), CapturedTurn(Device(monkeypatch), (0, 0))
    for _ in range(2):
        turn(lambda: network(*inputs(next(late))))
    with pytest.raises(RuntimeError, match="recompile"):
        turn(lambda: network(*inputs(next(late))))
    assert not turn.is_captured
    turn(lambda: network(*inputs(2)))
    assert turn.is_captured


@pytest.mark.cuda
def test_captured_shapes_alternate_and_leave_no_memory(float32_units):
    """Other shapes and ratios, with images made ahead beside; eager and captured agree, and memory comes back."""
    memory = []
    for _ in range(2):
        models = [iterate(execution, "cuda", steps=())[0] for execution in ("eager", "captured")]
        for batch_size, ratio in ((4, 3), (6, 5), (4, 2)):
            config = CONFIG.replace(batch_size=batch_size)
            draws = distillation.make_draws(config, models[0].generator, torch.device("cuda"))
            for step in range(4 * ratio):
                for model in models:
                    model.dfake_gen_update_ratio = ratio
                eager, captured = (model.iterate(step, draws)["loss_fake"].item() for model in models)
                assert captured == pytest.approx(eager, rel=1e-2), (batch_size, ratio, step)
            assert models[1].captured_turns == {"generator", "guidance", "generation"}
        del models, model
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # every stream that was used has one
        memory.append(torch.cuda.memory_allocated())
    assert memory[1] <= memory[0] + 2**20
