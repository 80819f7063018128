"""`cachekd peek`: what it shows of a token is what the cache rebuilds; others' texts stay texts."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cachekd.cache import LogitCache
from cachekd.data import open_samples
from cachekd.data.sample import message_text
from cachekd.errors import CachekdError
from cachekd.report.pages import page_environment, peek_page
from cachekd.report.peek import PeekedData, PeekedSample, choose, embedded, peek
from cachekd.report.token_texts import TokenTexts, find_reader
from cachekd_cli.console import visible
from cachekd_cli.main import app
from caches import copied, dump_cache, reseal
from tiny import noise_image, tiny_processor, write_llava_json

HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=2>",
    "[red]\x1b[2Jgone\u202eback[/red]",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six samples; keys and questions of the first three are hostile, the last has one answer."""
    path = write_llava_json(tmp_path_factory.mktemp("peeked"), 6)
    records = json.loads(path.read_text())
    for record, text in zip(records, HOSTILE, strict=False):
        record["id"] = text
        record["conversations"][0]["value"] = f"<image>\n{text}"
    records[5]["conversations"] = records[5]["conversations"][:2]
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_path, data) -> LogitCache:
    out = tmp_path_factory.mktemp("peeked") / "cache"
    return LogitCache(dump_cache(out, teacher_path, data, top_k=4))


@pytest.fixture(scope="module")
def looked(cache, data) -> list[PeekedSample]:
    """All samples, with texts and turns."""
    reader = find_reader(cache, None)
    opened = PeekedData(cache, open_samples(data), reader.processor)
    return [
        peek(cache, key, text_of=reader.texts.__getitem__, sample=sample, turns=opened.turns(sample))
        for key in cache
        for sample in [opened[key]]
    ]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["peek", *map(str, arguments)])


def test_tokens_are_what_the_cache_rebuilds(cache, looked):
    for sample in looked:
        targets = cache[sample.key]
        everywhere = targets.everywhere()
        p = everywhere.double().softmax(-1)
        assert [token.id for token in sample.tokens] == targets.token_ids.tolist()
        for row, token in enumerate(sample.tokens):
            kept = set(targets.ids[row, : targets.k[row]].tolist())
            ordered = everywhere[row].sort(descending=True).values
            assert token.logprob == pytest.approx(float(everywhere[row, token.id]), abs=1e-4)
            assert token.rank == int((ordered > everywhere[row, token.id]).sum()) + 1
            assert token.entropy == pytest.approx(float(-(p[row] * p[row].log()).sum()), abs=1e-3)
            assert (token.k, token.knee) == (int(targets.k[row]), int(targets.knee[row]))
            assert [one.logprob for one in token.alternatives] == pytest.approx(
                ordered[:5].tolist(), abs=1e-4
            )
            assert len({one.id for one in token.alternatives}) == 5
            for one in (token, *token.alternatives):
                assert one.origin == ("kept" if one.id in kept else "sketch")
                assert one.logprob == pytest.approx(float(everywhere[row, one.id]), abs=1e-4)
    origins = {one.origin for sample in looked for token in sample.tokens for one in token.alternatives}
    assert origins == {"kept", "sketch"}


def test_tokens_and_turns_spell_the_answers(cache, data, looked):
    samples = open_samples(data)
    for index, sample in enumerate(looked):
        answers = [message_text(m) for m in samples[index].messages if m["role"] == "assistant"]
        for turn, answer in enumerate(answers):
            texts = [token.text for token in sample.tokens if token.turn == turn]
            assert "".join(texts) == f"{answer}<|end|>"
        assert {token.turn for token in sample.tokens} == set(range(len(answers)))
        assert [(size.width, size.height) for size in sample.images or []] == [(32, 32)]


def test_without_a_sketch_only_kept_ids_are_alternatives(tmp_path, teacher_path, data):
    cache = LogitCache(dump_cache(tmp_path / "cache", teacher_path, data, tail="none", top_k=3))
    for key in cache:
        for token in peek(cache, key).tokens:
            assert len(token.alternatives) == token.k <= 3
            assert all(one.origin == "kept" for one in token.alternatives)
            among = token.id in [one.id for one in token.alternatives]
            assert token.origin == ("kept" if among else "spread")
            assert among or token.rank == token.k + 1
            assert token.text == f"#{token.id}"


def test_the_most_surprising_come_first(cache, looked):
    order = choose(cache, 4, "surprising", cache)
    expected = sorted(looked, key=lambda sample: -sample.surprise)
    assert order == [sample.key for sample in expected[:4]]
    assert choose(cache, 2, "first", cache) == list(cache)[:2]
    assert choose(cache, 9, "first", {order[3]}) == [order[3]]


@pytest.mark.parametrize("what", ["image", "text"])
def test_a_changed_sample_is_refused(tmp_path, cache, data, what):
    changed = copied(data.parent, tmp_path / "data") / data.name
    if what == "image":
        noise_image(99).save(changed.parent / "4.png")
    else:
        changed.write_text(changed.read_text().replace("a large green dog.", "a large green cat."))
    key = "s004" if what == "image" else next(key for key in cache if "dog" in str(answers(data, key)))
    result = run(cache.path, key, "--data", changed)
    assert isinstance(result.exception, CachekdError)
    assert "differs from the one that the teacher saw" in str(result.exception)
    assert repr(key) in str(result.exception)
    assert result.output.strip() == ""


def answers(data: Path, key: str) -> list[Any]:
    samples = open_samples(data)
    return [m for m in samples[samples.keys.index(key)].messages if m["role"] == "assistant"]


@pytest.mark.parametrize("command", ["peek", "verify"])
def test_a_cache_cannot_name_what_is_run(tmp_path, monkeypatch, cache, data, teacher_path, command):
    """A manifest comes from anybody, and its `map` would be imported from the current folder too."""
    folder = copied(cache.path, tmp_path / "c")
    shutil.rmtree(folder / "dump")  # which is not published
    reseal(folder / "manifest.json", lambda manifest: manifest["sources"][0]["data"].update(map="evil:run"))
    (tmp_path / "evil.py").write_text("open('ran', 'w')\ndef run(record): return record")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    teacher = ["--teacher", str(teacher_path)] if command == "verify" else []
    arguments = [command, str(folder), "--data", str(data), *teacher]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, CachekdError)
    assert "add --map evil:run if you know" in str(error)
    assert not (tmp_path / "ran").exists()
    if command == "peek":
        assert CliRunner().invoke(app, [*arguments, "--map", "evil:run"]).exit_code == 0
        assert (tmp_path / "ran").exists()


def test_another_tokenizer_is_refused(tmp_path, cache):
    tiny_processor(corpus=["something else entirely"] * 9).save_pretrained(tmp_path)
    with pytest.raises(CachekdError, match="not the tokenizer that the cache was made with"):
        find_reader(cache, str(tmp_path))
    with pytest.raises(CachekdError, match="there is no such tokenizer"):
        find_reader(cache, str(tmp_path / "nothing"))


@pytest.fixture
def older(tmp_path, cache) -> Path:
    """The cache, as a version made it that did not store what the token ids stand for."""
    path = copied(cache.path, tmp_path / "older")
    reseal(path / "manifest.json", lambda values: values.pop("vocabulary"))
    return path


def test_a_tokenizer_alone_tells_no_answers_apart(tmp_path, older, data):
    tiny_processor().tokenizer.save_pretrained(tmp_path)
    for key, turns in (("s004", {None}), ("s005", {0})):  # of one answer there is nothing to tell apart
        (sample,) = json.loads(run(older, key, "--tokenizer", tmp_path, "--data", data, "--json").stdout)
        assert "".join(token["text"] for token in sample["tokens"]).endswith("<|end|>")
        assert {token["turn"] for token in sample["tokens"]} == turns
        assert sample["messages"][0]["role"] == "user"


def test_where_the_teacher_is_not_the_cache_says_what_its_tokens_are(tmp_path, cache, data, looked):
    path = copied(cache.path, tmp_path / "cache")
    reseal(path / "manifest.json", lambda values: values["teacher"].update(name="elsewhere/teacher"))
    result = run(path, "s004", "--data", data, "--json")
    (sample,) = json.loads(result.stdout)
    (expected,) = (one for one in looked if one.key == "s004")
    assert [(one["text"], one["turn"]) for one in sample["tokens"]] == [
        (one.text, one.turn) for one in expected.tokens
    ]
    assert "is not here" not in result.stderr


def test_of_an_older_cache_ids_are_shown(older):
    reseal(older / "manifest.json", lambda values: values["teacher"].update(name="elsewhere/teacher"))
    result = run(older, "s004", "--json")
    (sample,) = json.loads(result.stdout)
    assert all(token["text"] == f"#{token['id']}" for token in sample["tokens"])
    assert sample["messages"] is None
    assert "elsewhere/teacher is not here" in result.stderr


def test_what_has_no_text_of_its_own_is_told_apart():
    class Pieces:
        def convert_ids_to_tokens(self, token: int) -> str | None:
            return {1: "▁the", 2: "▁", 3: "<0xE2>", 5: "æ", 6: "caf\u0122"}.get(token)

        def decode(self, tokens: list[int], **_: Any) -> str:
            return "caf\ufffd" if tokens == [6] else "\ufffd"

    texts = TokenTexts(Pieces())
    found = [texts[token] for token in (1, 2, 3, 4, 5, 6)]
    assert found == [" the", " ", "<0xE2>", "#4", "\ufffd#5", "caf\ufffd"]


def test_the_terminal_shows_question_tokens_and_alternatives(cache, data, looked):
    sample = next(one for one in looked if one.key == "s004")
    text = run(cache.path, "s004", "--data", data).output
    for token in sample.tokens:
        assert visible(token.text) in text
        assert f"rank {token.rank}  entropy {token.entropy:.3f}  k {token.k}" in text
    assert "32 x 32 pixels" in text
    assert "user: [image] what is the color?" in text
    assert "sketch" in text


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_terminal_shows_hostile_texts_as_they_are(cache, data, place):
    key = list(cache)[place]
    text = "".join(run(cache.path, key, "--data", data).output.split())
    assert "\x1b[2J" not in text
    assert "\u202e" not in text
    assert "".join(visible(HOSTILE[place]).split()) in text


def test_a_key_that_is_not_there_is_explained(cache, data, tmp_path):
    assert "the cache has no sample 's00'" in str(run(cache.path, "s00", "--data", data).exception)
    fewer = copied(data.parent, tmp_path / "data") / data.name
    fewer.write_text(json.dumps(json.loads(fewer.read_text())[:5]))
    assert "the data set has no sample 's005'" in str(run(cache.path, "s005", "--data", fewer).exception)
    assert len(json.loads(run(cache.path, "--data", fewer, "--samples", 9, "--json").stdout)) == 5


@settings(max_examples=50)
@given(st.lists(st.text(alphabet=st.sampled_from("<>&/!-script\"'\u2028\u2029\ud800é🙂\\\n")), max_size=3))
def test_json_in_a_page_means_nothing_to_html(value):
    text = page_environment().from_string("{{ value|tojson }}").render(value=value)
    assert json.loads(text) == value
    assert not re.search(r"[<>&\u2028\u2029]", text)


@pytest.fixture(scope="module")
def page(tmp_path_factory, cache, data) -> Path:
    out = tmp_path_factory.mktemp("page") / "peek.html"
    result = run(cache.path, "--data", data, "--order", "surprising", "--html", out)
    assert result.exit_code == 0, result.exception
    return out


def data_of(page: Path) -> list[dict[str, Any]]:
    return json.loads(re.search(r'json">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def test_the_page_holds_hostile_texts_as_data_only(page):
    html = page.read_text()
    assert re.findall(r"<script[^>]*>", html) == ['<script id="data" type="application/json">', "<script>"]
    assert html.count("</script") == 2
    assert "<img" not in html
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html
    held = data_of(page)
    assert set(HOSTILE) <= {sample["key"] for sample in held}
    assert all(source.startswith("data:image/png;base64,") for s in held for source in s["sources"])


def test_a_large_image_is_made_smaller():
    source = embedded(noise_image(1, (2000, 1000)))
    assert source.startswith("data:image/jpeg;base64,")
    assert len(source) < 640 * 320


@pytest.fixture
def tab(browser, page) -> Iterator[Any]:
    """The page, opened; afterwards: nothing was logged, raised, asked or fetched, and no hostile text ran."""
    opened, troubles, requests = browser.new_page(viewport={"width": 1280, "height": 900}), [], []
    opened.on("console", lambda message: troubles.append(message.text))
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("dialog", lambda dialog: troubles.append(dialog.message))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(page.as_uri())
    yield opened
    hacked = opened.evaluate("window.hacked")
    opened.close()
    assert troubles == []
    assert hacked is None
    assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]


def title(tab: Any) -> str:
    return tab.locator("main h2").inner_text()


@pytest.fixture(scope="module")
def by_surprise(looked) -> list[str]:
    """Keys as the page shows them."""
    return [visible(one.key) for one in sorted(looked, key=lambda one: -one.surprise)]


@pytest.mark.slow
def test_the_page_can_be_clicked_through(tab, by_surprise):
    assert title(tab) == by_surprise[0]
    assert tab.locator("#previous").is_disabled()
    tab.click("#next")
    assert title(tab) == by_surprise[1]
    assert tab.locator("#position").inner_text() == f"2 of {len(by_surprise)}"
    tab.keyboard.press("ArrowRight")
    assert title(tab) == by_surprise[2]
    tab.keyboard.press("ArrowLeft")
    tab.click("#previous")
    assert title(tab) == by_surprise[0]
    tab.locator("#list button").last.click()
    assert title(tab) == by_surprise[-1]
    assert tab.locator("#next").is_disabled()
    tab.keyboard.press("ArrowRight")
    assert title(tab) == by_surprise[-1]
    shown = tab.evaluate("[...document.images].map((image) => image.complete && image.naturalWidth)")
    assert shown == [32]


@pytest.mark.slow
def test_the_page_is_searched_and_sorted(tab, by_surprise):
    tab.keyboard.press("/")
    tab.keyboard.type("S004")
    assert tab.locator("#list .key").all_inner_texts() == ["s004"]
    assert title(tab) == "s004"
    tab.fill("#search", "<img src=x onerror=window.hacked=3>")
    assert "no key contains" in tab.locator("#list").inner_text()
    assert tab.locator("main").inner_text() == "No sample to show."
    assert tab.locator("#next").is_disabled()
    tab.keyboard.press("Escape")
    assert tab.locator("#list .key").all_inner_texts() == by_surprise
    tab.select_option("#sort", "calm")
    assert tab.locator("#list .key").all_inner_texts() == by_surprise[::-1]
    assert title(tab) == by_surprise[-1]
    tab.select_option("#sort", "key")
    assert tab.locator("#list .key").all_inner_texts() == sorted(by_surprise)
    tab.select_option("#sort", "surprise")
    assert title(tab) == by_surprise[0]


@pytest.mark.slow
def test_a_token_shows_its_alternatives(tab, page):
    tab.click("#list button:has-text('s004')")
    sample = next(one for one in data_of(page) if one["key"] == "s004")
    chips = tab.locator("main .token")
    assert chips.all_inner_texts() == [visible(token["text"]) for token in sample["tokens"]]
    assert tab.locator("main .token.other").count() == sum(token["rank"] > 1 for token in sample["tokens"])
    for index, token in enumerate(sample["tokens"]):
        chips.nth(index).hover()
        shown = tab.locator("#token .alternative")
        names = shown.locator(".text").evaluate_all("all => all.map(one => one.firstChild.textContent)")
        assert names[:10] == [re.sub("^ ", "␣", visible(one["text"])) for one in token["alternatives"]]
        rebuilt = sum(one["origin"] == "sketch" for one in token["alternatives"])
        assert tab.locator("#token .alternative.rebuilt .bar").count() >= rebuilt > 0
        assert f"{token['entropy']:.3f} nats" in tab.locator("#token").inner_text()
    chips.nth(0).click()  # pinned: hovering no longer changes it
    chips.nth(1).hover()
    assert chips.nth(0).get_attribute("aria-pressed") == "true"
    assert f"{sample['tokens'][0]['logprob']:.3f} nats" in tab.locator("#token").inner_text()
    tab.keyboard.press("Escape")
    chips.nth(1).hover()
    chips.nth(0).hover()
    chips.nth(1).hover()
    assert f"{sample['tokens'][1]['logprob']:.3f} nats" in tab.locator("#token").inner_text()


@pytest.mark.slow
def test_hostile_tokens_are_texts_too(browser, tmp_path, cache, looked):
    token = looked[0].tokens[0]
    evil = token.model_copy(
        update={
            "text": HOSTILE[1],
            "alternatives": [one.model_copy(update={"text": HOSTILE[0]}) for one in token.alternatives],
        }
    )
    sample = looked[0].model_copy(update={"tokens": [evil]})
    page = tmp_path / "page.html"
    page.write_text(peek_page(HOSTILE[0], cache.manifest, [sample], [["data:,"]]), encoding="utf-8")
    tab, troubles = browser.new_page(color_scheme="dark"), []
    tab.on("pageerror", lambda error: troubles.append(str(error)))
    tab.goto(page.as_uri())
    assert tab.locator("h1").inner_text() == HOSTILE[0]
    assert tab.locator("main .token").inner_text() == HOSTILE[1]
    assert tab.locator("#token .alternative .text").first.inner_text().startswith(HOSTILE[0])
    assert (tab.evaluate("window.hacked"), troubles) == (None, [])
    tab.close()


def test_visible_leaves_printable_text_alone():
    assert visible("naïve 漢字 🙂") == "naïve 漢字 🙂"
    assert visible("a\n\x1b[0m\u202e") == "a↵\\x1b[0m\\u202e"
