"""No layer takes another's number: attention in unusual forms is read, or counted as a layer that is refused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_monitor import AttentionRecorder, record_attention
from attn_monitor.errors import ForwardError, InputTypeError, UnsupportedAttentionError

Core = Callable[["Block", Tensor, Tensor, Tensor], Tensor]
IMAGES = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(3))


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * q.shape[-1] ** -0.5


class Block(nn.Module):
    """A transformer block; ``truth`` is what its ``core`` says that it applies: (B, H, Q, K)."""

    def __init__(self, model: ViT, number: int, core: Core) -> None:
        super().__init__()
        self.number, self.core, self.shared, self.truth = number, core, model.shared, torch.zeros(0)
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.mix, self.other = nn.Linear(2, 2, bias=False), nn.Linear(16, 16)
        nn.init.normal_(self.qkv.weight, std=0.4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return x + self.out(self.core(self, q, k, v).transpose(1, 2).flatten(2))


class ViT(nn.Module):
    """CLS and 4 × 6 patches through blocks, each with a core of its own."""

    def __init__(self, *cores: Core) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared: dict[str, Tensor] = {}
        self.embed, self.cls = nn.Conv2d(3, 32, 8, 8), nn.Parameter(torch.randn(1, 1, 32))
        self.pos = nn.Parameter(torch.randn(1, 25, 32) * 0.3)
        self.blocks = nn.ModuleList(Block(self, number, core) for number, core in enumerate(cores))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        return self.run(x)[:, 0]

    def run(self, x: Tensor) -> Tensor:
        """All blocks, one after the other."""
        for block in self.blocks:
            x = block(x)
        return x


def plain(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = scores(q, k).softmax(-1)
    return block.truth @ v


def cls_row(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = scores(q, k).softmax(-1)
    return torch.cat([block.truth[:, :, :1] @ v, torch.zeros_like(v[:, :, 1:])], 2)


def rows_in_two_parts(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = scores(q, k).softmax(-1)
    return torch.cat([block.truth[:, :, :1] @ v, block.truth[:, :, 1:] @ v], 2)


def shared_map(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if block.number == 0:
        block.shared["map"] = scores(q, k).softmax(-1)
    block.truth = block.shared["map"]
    return block.truth @ v


def log_softmax(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = F.log_softmax(scores(q, k), -1).exp()
    return block.truth @ v


def exp_and_sum(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).exp()
    block.truth = weights / weights.sum(-1, keepdim=True)
    return block.truth @ v


def gated(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The results, as a sigmoid of the queries lets them through: it has the shape of what comes after products."""
    block.truth = scores(q, k).softmax(-1)
    return (block.truth @ v) * q.sigmoid()


def over_dim_2(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ scores(k, q).softmax(-2)).mT


def written_to_out(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.empty_like(scores(q, k))
    torch.softmax(scores(q, k), -1, out=weights)
    block.truth = weights
    return weights @ v


def multiplied_and_summed(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k).softmax(-1)[..., None] * v[:, :, None]).sum(-2)


def of_two_softmaxes(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = [scores(some, k).softmax(-1) for some in (q[:, :, :1], q[:, :, 1:])]
    return torch.cat(parts, 2) @ v


def values_alone(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v


UNSEEN = [multiplied_and_summed, of_two_softmaxes, over_dim_2]


def truth(model: ViT, number: int, images: Tensor = IMAGES) -> Tensor:
    """What a block applies in float64, for CLS: (B, H, rows, columns)."""
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        double(images.double())
    applied: Tensor = double.blocks[number].truth
    return applied[:, :, 0, 1:].unflatten(-1, (images.shape[2] // 8, -1))


def check_layers(model: ViT, wanted: dict[int, int], images: Tensor = IMAGES) -> None:
    """``wanted`` maps what is asked for to the block that must be shown."""
    for asked, number in wanted.items():
        (layer,) = record_attention(model, images, layers=asked)
        assert layer.layer == number
        assert layer.name.startswith(f"blocks.{number}")
        torch.testing.assert_close(layer.maps.double(), truth(model, number, images), atol=1e-5, rtol=1e-3)


def test_a_last_block_that_applies_only_the_row_of_cls_is_the_last_layer() -> None:
    check_layers(ViT(plain, plain, cls_row), {-1: 2, 2: 2, 0: 0, -2: 1})


def test_rows_of_one_softmax_may_meet_v_in_two_products() -> None:
    check_layers(ViT(plain, rows_in_two_parts), {0: 0, 1: 1})


def test_a_softmax_may_be_written_to_a_tensor_that_is_there() -> None:
    check_layers(ViT(plain, written_to_out), {0: 0, -1: 1})


@pytest.mark.parametrize("core", [exp_and_sum, log_softmax, gated])
def test_exponentials_of_scores_are_weights_and_gates_of_results_are_not(core: Core) -> None:
    model = ViT(core, plain, core)
    check_layers(model, {0: 0, 1: 1, -1: 2})
    assert len(record_attention(model, IMAGES, layers="all")) == 3


def test_exponents_are_no_logits() -> None:
    """Those of `log_softmax` are at most 0, whatever the scores were."""
    (layer,) = AttentionRecorder(ViT(plain, log_softmax), logits=True)(IMAGES)
    assert layer.max_logit_cls is None


def test_blocks_that_share_a_map_are_a_layer_each() -> None:
    model = ViT(shared_map, shared_map, shared_map)
    check_layers(model, {-1: 2, 0: 0, 1: 1})
    assert [layer.name for layer in record_attention(model, IMAGES, layers="all")] == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
    ]


@pytest.mark.parametrize("core", UNSEEN)
def test_a_last_block_that_is_not_recognised_is_refused(core: Core) -> None:
    model = ViT(plain, plain, core)
    for layers in (-1, 2, "blocks.2"):
        with pytest.raises(
            UnsupportedAttentionError, match=r"layer 2 \(blocks.2\) mixes tokens in an operation that is"
        ):
            record_attention(model, IMAGES, layers=layers)
    check_layers(model, {1: 1, -2: 1})


@pytest.mark.parametrize("in_dictionary", [True, False])
def test_blocks_that_are_in_no_list_are_counted_too(in_dictionary: bool) -> None:
    model = ViT(plain, plain, multiplied_and_summed)
    blocks = {f"block{number}": block for number, block in enumerate(model.blocks)}
    model.blocks = nn.ModuleDict(blocks) if in_dictionary else None
    for name, block in {} if in_dictionary else blocks.items():
        setattr(model, name, block)
    model.run = lambda x: functools.reduce(lambda x, block: block(x), blocks.values(), x)
    with pytest.raises(UnsupportedAttentionError, match=r"layer 2 \((blocks.)?block2\) mixes tokens"):
        record_attention(model, IMAGES)
    assert [layer.layer for layer in record_attention(model, IMAGES, layers=[0, 1])] == [0, 1]


def test_blocks_before_and_between_are_counted_too() -> None:
    model = ViT(plain, over_dim_2, multiplied_and_summed, plain)
    check_layers(model, {0: 0, -4: 0})
    with pytest.raises(UnsupportedAttentionError, match=r"layer 1 \(blocks.1\) mixes tokens"):
        record_attention(model, IMAGES, layers=1)
    with pytest.raises(UnsupportedAttentionError, match=r"layer 2 \(blocks.2\) mixes tokens"):
        record_attention(model, IMAGES[:1], layers=-2)
    with pytest.raises(UnsupportedAttentionError, match=r"layer 3 \(blocks.3, softmax"):
        record_attention(model, IMAGES, layers=-1)


def test_all_leaves_out_what_is_not_recognised() -> None:
    with pytest.warns(UserWarning, match=r"leaves out 1 of .*\n  layer 2 \(blocks.2\) mixes tokens"):
        layers = record_attention(ViT(plain, plain, over_dim_2), IMAGES, layers="all")
    assert [layer.layer for layer in layers] == [0, 1]


def test_a_block_of_the_same_class_in_which_no_tokens_mix_is_no_layer() -> None:
    check_layers(ViT(plain, plain, values_alone), {-1: 1, 0: 0})


def test_the_model_is_left_as_it_was() -> None:
    model = ViT(plain, over_dim_2)
    before, hooks = copy.deepcopy(model.state_dict()), len(model.blocks[1]._forward_hooks)
    record_attention(model, IMAGES, layers=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(model.blocks[1]._forward_hooks) == hooks == 0


def statistic_first(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A number for a log is made of the softmax, before its heads are mixed and applied."""
    weights = scores(q, k).softmax(-1)
    block.shared["statistic"] = weights @ block.other(v)
    return torch.einsum("bhqk,hg->bgqk", weights, block.mix.weight) @ v


def statistic_last(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = plain(block, q, k, v)
    block.shared["statistic"] = (block.truth * 0.5) @ block.other(v)
    return out


def head_by_head(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(-1)
    return torch.stack([weights[:, head] @ v[:, head] for head in (0, 1)], 1)


@pytest.mark.parametrize("cores", [(statistic_first,), (statistic_first, plain, plain)])
def test_a_statistic_of_the_softmax_is_not_taken_for_what_is_applied(cores: tuple[Core, ...]) -> None:
    with pytest.raises(
        UnsupportedAttentionError,
        match=r"its weights are not all that mixes them there|its weights are applied to more than one set of values",
    ):
        record_attention(ViT(*cores), IMAGES, layers=0)


def test_a_statistic_after_the_product_that_reaches_the_tokens_is_none_of_our_business() -> None:
    check_layers(ViT(statistic_last, statistic_last), {0: 0, -1: 1})


@pytest.mark.parametrize("others", [(), (plain, plain)])
def test_one_head_of_several_is_not_shown_as_the_layer(others: tuple[Core, ...]) -> None:
    with pytest.raises(UnsupportedAttentionError, match="a part of its keys or heads in each"):
        record_attention(ViT(head_by_head, *others), IMAGES, layers=0)


class CatchesAll(ViT):
    """Goes on after any exception of a block."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        for block in self.blocks:
            try:
                x = block(x)
            except BaseException:
                x = x * 0
        return x[:, 0]


class Retries(ViT):
    """Begins once more after any exception."""

    def forward(self, images: Tensor) -> Tensor:
        try:
            return super().forward(images)
        except BaseException:
            return super().forward(images)


class Rewords(ViT):
    """Raises an exception of its own in place of any other."""

    def forward(self, images: Tensor) -> Tensor:
        try:
            return super().forward(images)
        except BaseException as error:
            raise RuntimeError("the backbone failed") from error


@pytest.mark.parametrize("kind", [CatchesAll, Retries, Rewords])
def test_a_model_that_catches_every_exception_is_read_all_the_same(kind: type[ViT]) -> None:
    check_layers(kind(plain, plain, plain), {0: 0, 1: 1, -1: 2, 2: 2, -3: 0})


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


def fails(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise UnprintableError


def test_an_exception_that_cannot_be_printed_is_reported_by_its_type() -> None:
    with pytest.raises(ForwardError, match=r"ViT failed on images \(3, 3, 32, 48\) torch.float32: UnprintableError"):
        record_attention(ViT(plain, fails), IMAGES)


def test_sparse_images_are_refused_for_what_they_are() -> None:
    with pytest.raises(InputTypeError, match=r"received a tensor of layout sparse_coo, expected .*to_dense"):
        record_attention(ViT(plain), IMAGES.to_sparse())
