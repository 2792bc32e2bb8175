"""TensorBoard's event file holds layout, histograms, texts and hyper-parameters; and the curves of its layout exist."""

from __future__ import annotations

import pytest

from treepo_mega.config import load_config
from treepo_mega.loss.mismatch import share_names
from treepo_mega.monitor.progress import Progress
from treepo_mega.monitor.registry import check_known
from treepo_mega.monitor.sinks.tensorboard import LAYOUT, OUTCOMES, TensorBoard
from treepo_mega.plugins.trial import example_tree
from treepo_mega.records import Records
from treepo_mega.tree.elsewhere import Elsewhere

HOSTILE = "<script>alert(1)</script>\n# a heading\x1b[31m"


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """Of a run of two steps whose model wrote hostile text."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = tmp_path_factory.mktemp("run")
    fixed = ["model.hf_checkpoint=m", "data.train=[{path: t.jsonl}]", "train.lr=3e-5", f"logging.run_dir={directory}"]
    records = Records(load_config(None, fixed), Progress(enabled=False), started=0.0, resume_step=0)
    tree, far = example_tree(), example_tree()
    tree.advantages = [0.5, -1.0, 0.5]
    far.nodes[1].tokens = Elsewhere.of(7)
    shares = dict(zip(share_names(), (0.5, 0.25, 0.25, 0.0, 0.0), strict=True))
    for step in (1, 2):
        records.draw(step, [tree, far], lambda tokens: HOSTILE + str(tokens))
        records.log(step, {"train/loss": 0.5, **shares})
    records.close()
    accumulator = EventAccumulator(str(directory / "tensorboard"), size_guidance={"histograms": 0})
    accumulator.Reload()
    return accumulator


def test_histograms_are_of_every_leaf(events):
    assert [event.step for event in events.Histograms("histograms/advantages")] == [1, 2]
    advantages = events.Histograms("histograms/advantages")[0].histogram_value
    assert (advantages.num, advantages.sum, advantages.min, advantages.max) == (3, 0, -1, 0.5)
    lengths = events.Histograms("histograms/response_lengths")[0].histogram_value
    assert (lengths.num, lengths.min, lengths.max) == (6, 1, 9), "also of trees whose tokens are on another rank"
    assert events.Histograms("histograms/rewards")[0].histogram_value.sum == 4
    ratios = events.Histograms("histograms/log_ratio")[0].histogram_value
    assert ratios.num == 1 and list(ratios.bucket_limit) == [0.001, 0.01, 0.1, 1.0, 10.0]
    assert list(ratios.bucket) == [0.5, 0.25, 0.25, 0, 0]


def test_texts_are_samples_that_no_markdown_is_read_in(events):
    plugin = events.SummaryMetadata("samples/1/text_summary").plugin_data.plugin_name
    assert plugin == "text"
    (first,) = events.Tensors("samples/1/text_summary")
    assert first.step == 1, "trees are saved after step 1, not after step 2"
    text = first.tensor_proto.string_val[0].decode()
    assert "reward 1, advantage +0.500, stop eos" in text and "\x1b" not in text
    assert all(line.startswith("    ") for line in text.split("\n")), "a block of code"


def test_hyper_parameters_are_what_differs_from_the_defaults(events):
    from tensorboard.plugins.hparams import metadata

    start = metadata.parse_session_start_info_plugin_data(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )
    assert start.hparams["train.lr"].number_value == 3e-5 and "train.seed" not in start.hparams
    end = metadata.parse_session_end_info_plugin_data(
        events.SummaryMetadata("_hparams_/session_end_info").plugin_data.content
    )
    assert end.status == 1, "the run has ended well"


def test_the_layout_opens_on_curves_that_exist(events):
    from tensorboard.plugins.custom_scalar import layout_pb2

    assert events.SummaryMetadata("custom_scalars__config__").plugin_data.plugin_name == "custom_scalars"
    stored = events.Tensors("custom_scalars__config__")[0].tensor_proto
    layout = layout_pb2.Layout.FromString(stored.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    assert [category.title for category in layout.category] == list(LAYOUT)
    assert all(chart.multiline.tag for chart in charts)
    for name in [*(name for section in LAYOUT.values() for names in section.values() for name in names), *OUTCOMES]:
        check_known(name)


def test_closing_twice_says_once_that_the_run_has_ended(tmp_path):
    board = TensorBoard(tmp_path, purge_step=0, config={"train.lr": 1.0})
    board.close()
    board.close()
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    (path,) = tmp_path.rglob("events.out.tfevents.*")
    tags = [value.tag for event in LegacyEventFileLoader(str(path)).Load() for value in event.summary.value]
    assert tags.count("_hparams_/session_end_info") == 1
