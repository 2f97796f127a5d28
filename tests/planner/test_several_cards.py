"""The plan of several cards: what is sent and held by closed forms, and what qlora plan --processes says and refuses."""

import json

import pytest

from qlora.commands.plan import plan, plan_processes
from qlora.jobs.planning import shipped_recipes
from qlora.jobs.planning.plan_job import Budget, computer_of
from qlora.jobs.planning.several_card_plans import plan_several
from qlora.planner import several_cards
from qlora.planner.together import NCCL_BYTES, all_reduce_bytes, gather_bytes
from qlora.recipe import Recipe
from qlora.system.cards import CARDS, card_of
from qlora.system.errors import InputError
from tests import forked
from tests.conftest import some_slow
from tests.recipe.shapes import SHAPES

SEVERAL = [("qwen3-32b", 2, 24, "fsdp"), ("llama-3.3-70b", 2, 48, "fsdp"), ("llama-3.3-70b", 4, 24, "fsdp"),
           ("llama-3.3-70b", 2, 24, "fsdp_offload")]  # fmt: skip


def test_what_is_sent_is_that_of_a_ring():
    # each of N sends N - 1 pieces of 1/N twice for a sum, once to give its piece to all
    assert all_reduce_bytes(1000, 2) == 4000
    assert all_reduce_bytes(1000, 4) == 6000
    assert gather_bytes(1000, 4) == 750
    assert all_reduce_bytes(1000, 1) == gather_bytes(1000, 1) == 0


@pytest.fixture
def ways(make_recipe):
    """ways(count, link): of four rows a step, one a micro-batch."""

    def of(count, link=1e9):
        values = make_recipe().model_dump()
        values["training"] |= {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "tokens_per_micro_batch": None,
        }
        values["memory"] |= {"gradient_checkpointing": True}
        card = card_of("3090")
        budget = Budget(card.memory, card.name, card)
        return plan_several(Recipe.from_dict(values), None, budget, computer_of("3090"), count, link)

    return of


def test_each_way_holds_and_sends_what_the_closed_form_says(ways):
    one, data, shares, offloaded = ways(2)
    assert (one.micro_batches, data.micro_batches, shares.micro_batches) == (4, 2, 2)
    assert data.plan.peak_bytes == one.plan.peak_bytes + NCCL_BYTES
    assert data.compute_seconds == pytest.approx(one.compute_seconds / 2)
    assert data.step_seconds == pytest.approx(data.compute_seconds + data.sent_bytes / 1e9)
    elsewhere = data.plan.components["weights"] - shares.plan.components["weights"]
    layers, numbers = one.plan.num_layers, data.sent_bytes / 4  # a sum of float32 over two
    # the gradients of a micro-batch go to the owners of their masters, and 16-bit weights to all once a step
    summed, weights = 4 * numbers / 2, 2 * numbers / 2
    gathered = shares.sent_bytes - 2 * summed - weights
    # each micro-batch gathers half of all codes twice; half of all codes is elsewhere, but for three layers at work
    assert elsewhere == pytest.approx(gathered / 4 - 3 * gathered / 2 / layers, abs=4)
    assert shares.step_seconds == pytest.approx(
        max(shares.compute_seconds, gathered / 1e9) + (2 * summed + weights) / 1e9
    )
    adapters = [way.plan.components["adapter"] for way in (data, shares)]
    assert adapters == [6 * numbers, pytest.approx(4 * numbers, rel=0.02)]  # half of the masters
    # three layers of codes are on the card; half of all in CPU memory, from where they go to the card before they are sent
    codes = gathered / 2
    assert data.plan.components["weights"] - offloaded.plan.components["weights"] == pytest.approx(
        codes * (1 - 3 / layers), abs=4
    )
    assert codes / 2 <= offloaded.plan.host_bytes < codes
    host = card_of("3090").host_bandwidth
    assert offloaded.step_seconds == pytest.approx(
        max(offloaded.compute_seconds, gathered / 1e9 + 2 * codes / host) + (2 * summed + weights) / 1e9
    )
    optimizers = [way.plan.components["optimizer"] for way in (data, shares)]
    assert optimizers[1] == pytest.approx(optimizers[0] / 2, rel=0.02)


def test_a_slow_link_takes_fewer_and_larger_micro_batches_as_far_as_memory_allows(make_recipe):
    values = make_recipe().model_dump()
    values["training"] |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 16}
    values["data"] |= {"max_length": 512}
    recipe, card = Recipe.from_dict(values), card_of("3090")

    def planned(link, num_bytes=card.memory):
        budget = Budget(num_bytes, card.name, card)
        return plan_several(recipe, None, budget, computer_of("3090"), 2, link)[2]

    fast, slow = planned(1e15), planned(1e5)
    assert fast.micro_batches > slow.micro_batches == 1  # of 32 rows
    assert slow.sent_bytes < fast.sent_bytes
    tight = planned(1e5, (fast.plan.peak_bytes + slow.plan.peak_bytes) // 2)
    assert tight.plan.fits
    assert fast.micro_batches > tight.micro_batches > 1


def test_a_slow_link_does_not_pay_and_a_fast_one_does(ways):
    assert several_cards.advice(ways(2, link=1e15), None).startswith("It pays: at most 2.00 times")
    assert several_cards.advice(ways(2, link=1e3), None).startswith("It does not pay")


def test_a_batch_that_does_not_divide_and_what_several_processes_do_not_do_are_refused(ways, make_recipe):
    with pytest.raises(InputError, match=r"a step has 4 micro-batches, which 3 processes cannot share equally"):
        ways(3)
    with pytest.raises(InputError, match="give 2 or more"):
        ways(1)
    with pytest.raises(
        InputError, match="a step has 1 micro-batch, which 2 processes cannot share"
    ):  # it joins no rows
        plan_processes(make_recipe("gemma2"), 2, card="3090")
    with pytest.raises(InputError, match="--link 0"):
        plan_processes(make_recipe(), 2, card="3090", link=0)


def test_a_recipe_of_shares_is_not_planned_for_one_card(make_recipe):
    values = make_recipe().model_dump() | {"memory": {"sharding": "fsdp"}}
    with pytest.raises(InputError, match=r"fsdp is for several processes.*--processes 2"):
        plan(Recipe.from_dict(values), card="3090")


def test_the_command_prints_json_and_refuses_two_plans_at_once(make_recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(make_recipe().to_yaml())
    overrides = ("training.gradient_accumulation_steps=2",)
    done = forked.run("plan", file, *overrides, "--processes", "2", "--card", "3090", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [way["name"] for way in found["ways"]] == ["one card", "data parallel", "fsdp", "fsdp_offload"]
    assert found["fewest"] is None
    assert found["link_bytes_per_second"] == card_of("3090").link_bandwidth
    for way in found["ways"]:
        assert sum(way["components"].values()) == way["peak_bytes"]
    done = forked.run("plan", file, "--processes", "2", "--methods")
    assert done.returncode == 2
    assert "give one of them" in done.stderr
    done = forked.run("plan", file, "--link", "2")
    assert done.returncode == 2
    assert "--link is the GB/s between several cards: give --processes too" in done.stderr


def shipped(name, folder):
    """Return a shipped recipe, its model a folder with the config alone, as its header plans it."""
    path = shipped_recipes.path_of(name)
    (folder / "config.json").write_text(json.dumps(SHAPES[Recipe.load(path).model.name_or_path][0]))
    return Recipe.load(path, [f"model.name_or_path='{folder}'", "memory.gradient_checkpointing=true",
                              "training.tokens_per_micro_batch=2048"])  # fmt: skip


def test_where_nothing_fits_the_fewest_cards_that_would_do_are_named(tmp_path):
    card, values = card_of("3090"), shipped("qwen3-32b", tmp_path).model_dump()
    recipe = Recipe.from_dict(
        {**values, "memory": values["memory"] | {"offload": False}}
    )  # peaks are those of any budget

    def planned(count, num_bytes):
        return plan_processes(recipe, count, vram=f"{1.001 * num_bytes / 2**30:.4f}GiB", card=card.name)

    peaks = {(way["name"], count): way["peak_bytes"] for count in (2, 4, 8) for way in planned(count, 2**40)["ways"]}
    assert peaks["fsdp_offload", 4] < peaks["fsdp_offload", 2] < peaks["fsdp", 4]
    found = planned(2, peaks["fsdp_offload", 4])  # 4 is the next that 16 rows divide by
    assert not found["fits"]
    assert (found["fewest"]["processes"], found["fewest"]["name"]) == (4, "fsdp_offload")
    assert found["advice"].endswith("4 would do: --processes 4 memory.sharding=fsdp_offload.")
    found = planned(2, 2**30)
    assert found["fewest"] is None
    assert "Nor on more of them" in found["advice"]


@pytest.mark.parametrize(("name", "count", "gigabytes", "way"), some_slow(SEVERAL, set(SEVERAL[1:])))
def test_the_recipes_for_several_cards_fit_those_that_their_headers_name(name, count, gigabytes, way, tmp_path):
    path, recipe = shipped_recipes.path_of(name), shipped(name, tmp_path)
    card = min((card for card in CARDS if card.size == gigabytes), key=lambda card: card.memory)
    budget = Budget(card.memory, card.name, card)
    ways = {one.name: one for one in plan_several(recipe, None, budget, computer_of("3090"), count)}
    assert ways[way].plan.fits
    said = (
        f"{count} x {gigabytes} GB{' with fsdp_offload' * (way != 'fsdp')}: {ways[way].plan.peak_bytes / 2**30:.1f} GiB"
    )
    assert said in path.read_text(encoding="utf-8")
