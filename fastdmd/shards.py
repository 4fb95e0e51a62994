"""Networks of which every process has a part (FSDP2): how they are cut, and where in memory their parts lie."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

LEAST_SHARE = 1 / 64  # of a network's parameters that a module has which is gathered by itself: less waits for latency
FORWARDS = ("with_features",)  # of a denoiser, besides `forward`

Network = TypeVar("Network", bound=nn.Module)


class Sharding:
    """How a network is cut, and others like it, of which there is never a whole one.

    Parameters are cut along their first dimension (`torch.distributed.fsdp.fully_shard`). While it runs, a network
    gathers them module by module: each entry of a ModuleList or Sequential with a 64th of all parameters or more, and
    what is left with the network itself. So entries are to be called, not read, by the network they are in. An entry
    that has a parameter in common with what is outside of it is gathered with that. Parameters become contiguous, as
    FSDP2 takes no other.

    Made of a network that is whole, and before it is cut. Raises ValueError for a group of one process, and for
    parameters that have no shape yet, or no dimension.
    """

    def __init__(self, network: nn.Module, group: Any):
        if group is None or group.size() == 1:
            raise ValueError("fastdmd.Sharding: expected a process group of several processes, got one process")
        if waiting := next((name for name, own in network.named_parameters() if is_lazy(own)), None):
            raise ValueError(f"fastdmd.Sharding: expected parameters that have their shape, got {waiting} without")
        if single := next((name for name, own in network.named_parameters() if own.dim() == 0), None):
            raise ValueError(
                f"fastdmd.Sharding: expected parameters with a dimension to cut, got {single} without; one of shape "
                "(1,) is added and multiplied as it is"
            )
        from torch.distributed.device_mesh import DeviceMesh

        self.group = group
        self._mesh = DeviceMesh.from_group(group, next(network.parameters()).device.type)
        self._blueprint = _without_memory(network)

    def cut_(self, network: Network, *, compute_dtype: torch.dtype | None = None) -> Network:
        """Lets this process keep its part of a network that is whole, and the same in all of them.

        `compute_dtype` is what parameters are gathered in, and their gradients are averaged in.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        for parameter in network.parameters():
            parameter.data = parameter.data.contiguous()
        cast(Any, network).gathered_dtype = compute_dtype
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, cast_forward_inputs=False)
        modules: list[nn.Module] = [*_apart(network), network]
        for module in modules:
            # By default the outermost stays gathered after a forward, with weights that an update does not reach.
            fully_shard(module, mesh=self._mesh, reshard_after_forward=True, mp_policy=policy)
            if self._mesh.device_type == "cpu":  # gloo's mean is younger than its sum
                cast(Any, module).set_force_sum_reduction_for_comms(True)
        for method in FORWARDS:
            if hasattr(network, method):
                register_fsdp_forward_method(network, method)
        return network

    @torch.no_grad()
    def like(
        self,
        source: Network,
        *,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        extend: Callable[[Any], None] = lambda network: None,
    ) -> Network:
        """A copy of one that is cut, in eval mode, part by part; `dtype` is that of its parameters. What `extend` adds
        to them is zero."""
        network = copy.deepcopy(self._blueprint).eval()
        extend(network)
        for parameter in network.parameters():
            parameter.data = parameter.data.to(parameter.dtype if dtype is None else dtype)
        self.cut_(network, compute_dtype=compute_dtype)
        device, theirs = next(source.parameters()).device, dict(source.named_parameters())
        rooms = {name: torch.zeros(room(own), dtype=own.dtype, device=device) for name, own in _named(network).items()}
        place(network, rooms)
        for name, own in _named(network).items():
            if name in theirs:
                local(own).copy_(local(theirs[name]))
        for buffer, other in zip(network.buffers(), source.buffers(), strict=True):
            buffer.copy_(other)
        return cast(Network, network)


def is_cut(network: Any) -> bool:
    """Whether each process has a part of it, so that all of them have to run it together."""
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    return any(hasattr(own, "to_local") for own in parameters)


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor, in its own memory; all of one that is not cut."""
    with torch.no_grad():
        return cast(Any, x).to_local() if hasattr(x, "to_local") else x


def whole(x: Tensor) -> Tensor:
    """All of a tensor, on the host; all processes ask for it."""
    return cast(Any, x).full_tensor().cpu() if hasattr(x, "full_tensor") else x.cpu()


def room(parameter: Tensor) -> tuple[int, ...]:
    """The shape of this process's part and of what fills it up: in all processes the same."""
    mesh = cast(Any, parameter).device_mesh
    return -(-parameter.shape[0] // mesh.size()), *parameter.shape[1:]


def joined(part: Tensor, like: Tensor) -> Tensor:
    """A tensor cut as another one, of which this is the part of this process."""
    from torch.distributed.tensor import DTensor

    other = cast(Any, like)
    return DTensor.from_local(
        part, other.device_mesh, other.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def part_of(x: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that is whole in all of them, cut as another one is, in memory of its own."""
    if not hasattr(like, "to_local"):
        return x
    first = cast(Any, like).device_mesh.get_local_rank() * room(like)[0]
    part = x[first : first + len(local(like))]
    return joined(torch.empty_like(local(like)).copy_(part), like)


def fill_parts(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """As `load_state_dict`, of a state that is whole, into a network of which each process has a part, or all.

    What modules keep by `get_extra_state`, and no file of tensors has, they are given back.
    """
    own = network.state_dict()
    parts = {name: part_of(value, own.get(name, value)) for name, value in state.items()}
    extra = {name: value for name, value in own.items() if not isinstance(value, Tensor)}
    network.load_state_dict(extra | parts)


def unfilled(shape: Sequence[int], dtype: torch.dtype, group: Any) -> Tensor:
    """Memory on the host for this process's part of a tensor."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    rows = -(-shape[0] // group.size())
    num = min(max(shape[0] - group.rank() * rows, 0), rows)
    whole_one = torch.empty(tuple(shape), device="meta")
    part = torch.empty(num, *shape[1:], dtype=dtype)
    mesh = DeviceMesh.from_group(group, "cpu")
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=whole_one.shape, stride=whole_one.stride())


@torch.no_grad()
def place(network: nn.Module, rooms: Mapping[str, Tensor]) -> None:
    """Lets parts of parameters, by name, lie in given memory of the shape `room`; parameters become other objects.

    What a part leaves of its room is zero and stays so. FSDP2 gathers from memory that it has filled up itself, unless
    it finds parameters of that size: so it gets the whole room first, and then the part of it.
    """
    before = _named(network)
    twins = dict(network.named_parameters(remove_duplicate=False))
    for get in (lambda name: rooms[name], lambda name: rooms[name].narrow(0, 0, len(local(before[name])))):
        made = {
            id(before[name]): nn.Parameter(joined(get(name), before[name]), before[name].requires_grad)
            for name in rooms
        }
        found = {name: made[id(own)] for name, own in twins.items() if id(own) in made}
        network.load_state_dict(found, strict=False, assign=True)
    now = _named(network)
    for name, own in rooms.items():
        part = local(now[name])
        if part.numel() and part.data_ptr() != own.data_ptr():
            raise RuntimeError(f"fastdmd.shards: expected {name} to lie where it was put, got it elsewhere")


def gathered(network: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that a forward computes with, the same objects every time; all processes ask for them."""
    from torch.distributed.fsdp import FSDPModule

    seen: set[int] = set()
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            for parameter in cast(nn.Module, module).parameters():
                if not hasattr(parameter, "to_local") and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter
            module.reshard()


def rest(network: nn.Module) -> None:
    """For one that has run forwards and runs no backward pass, until which FSDP2 keeps their order, some 50 bytes a
    module and forward. A torch that has no such call keeps it."""
    if (reset := getattr(network, "reset_iter_state", None)) is not None:
        reset()


def _named(network: nn.Module) -> dict[str, nn.Parameter]:
    return dict(network.named_parameters())


def _without_memory(network: Network) -> Network:
    """A copy whose parameters have shapes alone, contiguous."""
    stand_ins: dict[int, Any] = {}
    for own in network.parameters():
        empty = torch.empty(own.shape, dtype=own.dtype, device="meta")
        stand_ins[id(own)] = nn.Parameter(empty, requires_grad=own.requires_grad)
    return copy.deepcopy(network, stand_ins)


def _apart(network: nn.Module) -> list[nn.Module]:
    """What is gathered by itself, the innermost first."""
    least = LEAST_SHARE * _size(network)
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    found: dict[nn.Module, None] = {}

    def look(module: nn.Module) -> None:
        for child in module.children():
            look(child)
            is_called = not isinstance(child, (nn.ModuleList, nn.ModuleDict))
            if isinstance(module, (nn.ModuleList, nn.Sequential)) and is_called and _size(child) >= least:
                inside = set(child.modules())
                if all(owners[parameter] <= inside for parameter in child.parameters()):
                    found[child] = None

    look(network)
    return list(found)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
