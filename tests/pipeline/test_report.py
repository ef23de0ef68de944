"""Reports: one page that works offline and by keyboard, and that no name in a file can turn against its reader."""

import re

import numpy as np
import pytest
import torch
from browser import PATH, Browser
from exports import Pairs, export, net, pictures

import attrbox
from attrbox.data.models.loaded_model import LoadedModel
from attrbox.errors import FileError, InputError
from attrbox.pipeline.report.page import write_report
from attrbox.pipeline.stored_scores import read_scores, write_scores

EVIL = "</script><img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"
NAMES = [EVIL, "<!--", "{{data}}", "zebra", "ü 'quoted'", "last", "\u2028line", "a&amp;b", "\x1b[31mred", "nul\0"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    images = pictures()
    names = (EVIL, "cat", "dog", "<b>bird</b>", "fish")
    loaded = LoadedModel(net(), EVIL, mean=(0.0,) * 3, std=(1.0,) * 3, categories=names)
    methods = ["saliency", "deeplift", ("integrated_gradients", {"steps": 3}), "grad_cam"]
    export(folder / "maps.h5", Pairs(images, broken=[5]), model=loaded, methods=methods, ids=NAMES)
    rows = [0, 1, 2, 3, 4, 6, 7, 8, 9]
    with attrbox.open_maps(folder / "maps.h5") as maps:
        tensors = {label: maps[label][rows] for label in maps}
        scores = attrbox.evaluate(net(), images[rows], tensors, ["morf", "sparseness"], progress=False)
    write_scores(folder / "maps.h5", scores, rows, 10)
    return write_report(folder / "maps.h5", folder / "page.html", title=EVIL), scores


def test_the_page_is_one_file_in_which_no_name_is_a_tag(page):
    text = page[0].read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!data:)http""", text)
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert 'onerror="document' not in text
    assert text.count("<script") == 2
    assert text.count("</script>") == 2
    assert "sha256-" in text.split("script-src")[1][:20]
    assert "nul\\\\x00" in text


def test_scores_are_kept_in_the_file(page):
    path, scores = page
    with attrbox.open_maps(path.with_name("maps.h5")) as maps:
        stored = read_scores(maps)
        assert stored.controls == scores.controls == ("random", "sobel")
        assert list(stored)[:4] == list(maps)
        rows = [0, 1, 2, 3, 4, 6, 7, 8, 9]
        for label in scores:
            for metric in ("morf", "sparseness"):
                np.testing.assert_allclose(stored[label][metric].values[rows], scores[label][metric].values, rtol=1e-6)
                assert stored[label][metric].values[5].isnan()
                assert stored[label][metric].mean == pytest.approx(scores[label][metric].mean, rel=1e-6)
        assert "|" in stored.table()
    assert attrbox.verify(path.with_name("maps.h5")) == []


@pytest.mark.skipif(PATH is None, reason="no chromium, chromium-browser or google-chrome is installed")
def test_it_works_in_a_browser_offline_and_by_keyboard(page, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        browser.call(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0
        )
        browser.open(page[0])
        count = "document.querySelectorAll('article').length"
        assert browser.evaluate(count) == 9
        assert browser.evaluate("document.title") == EVIL
        assert browser.evaluate("document.querySelector('article b').textContent") == EVIL
        assert browser.evaluate("document.querySelectorAll('img[src=x], #gallery script').length") == 0
        assert browser.evaluate("document.querySelectorAll('svg polyline').length") == 6
        assert browser.evaluate("document.querySelectorAll('#scores tbody tr').length") == 6
        # Filter, sort and find.
        set_value = (
            "(id, value, event) => { const e = document.getElementById(id); e.value = value;"
            " e.dispatchEvent(new Event(event)); }"
        )
        first = "document.querySelector('article b').textContent"
        browser.evaluate(f"({set_value})('find', 'ZEB', 'input')")
        assert browser.evaluate(count) == 1
        assert browser.evaluate(first) == "zebra"
        browser.evaluate(f"({set_value})('find', '', 'input')")
        for metric, kind in (("morf", '["metric","morf","deeplift"]'), ("disagreement", '["disagreement"]')):
            browser.evaluate(f"({set_value})('sort', '{kind}', 'change')")
            values = browser.evaluate(
                "[...document.querySelectorAll('article b:first-child')].map(b => b.textContent)"
                ".map(id => data.samples.find(s => s.id === id)).filter(s => s)"
                f".map(s => '{metric}' === 'morf' ? s.scores.morf.deeplift : s.disagreement)"
            )
            assert len(values) == 9
            assert values == sorted(values)
        browser.evaluate(f"({set_value})('class', data.samples[0].class, 'change')")
        assert 0 < browser.evaluate(count) < 9
        browser.evaluate(f"({set_value})('class', '', 'change')")
        # Colours, overlay and the keys.
        pixel = (
            "new Promise(done => setTimeout(() => done([...document.querySelector('#gallery canvas').getContext('2d')"
            ".getImageData(3, 3, 1, 1).data].join()), 200))"
        )
        before = browser.evaluate(pixel)
        browser.press("c", "KeyC")
        assert browser.evaluate("document.getElementById('scale').value") == "heat"
        after = browser.evaluate(pixel)
        assert after != before
        browser.press("[", "BracketLeft")
        assert browser.evaluate("document.getElementById('overlay').value") == "90"
        assert browser.evaluate(pixel) != after
        browser.press("j", "KeyJ")
        browser.press("j", "KeyJ")
        assert browser.evaluate("[...document.querySelectorAll('article')].indexOf(document.activeElement)") == 1
        browser.press("Tab")
        assert browser.evaluate("document.activeElement.tagName") == "BUTTON"
        browser.press("Enter")
        assert browser.evaluate("document.getElementById('large').open") is True
        browser.press("Escape")
        assert browser.evaluate("document.getElementById('large').open") is False
        browser.press("/", "Slash")
        assert browser.evaluate("document.activeElement.id") == "find"
        assert not [entry for entry in browser.log if "exception" in entry or "Content Security" in entry]
        requests = [entry for entry in browser.log if '"request"' in entry]
        assert all('"url": "data:' in entry or '"url": "file:' in entry for entry in requests)


def test_what_cannot_be_reported_is_told(tmp_path):
    with pytest.raises(FileError, match="there is no"):
        write_report(tmp_path / "none.h5", tmp_path / "page.html")
    vectors = attrbox.compare(torch.nn.Linear(4, 2).eval(), torch.randn(3, 4), ["saliency"])
    vectors.to_hdf5(tmp_path / "vectors.h5")
    with pytest.raises(InputError, match="maps of images"):
        write_report(tmp_path / "vectors.h5", tmp_path / "page.html")
    export(tmp_path / "maps.h5", methods=["saliency"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="folder"):
        write_report(tmp_path / "maps.h5", tmp_path / "folder")
    assert not (tmp_path / "page.html").exists()


def test_a_file_without_photographs_or_scores_is_reported_too(tmp_path):
    result = attrbox.compare(net(), pictures(3), ["saliency", "deeplift"], target=attrbox.top(2))
    result.to_hdf5(tmp_path / "maps.h5")
    text = write_report(tmp_path / "maps.h5", tmp_path / "page.html", n_samples=2, side=8).read_text()
    assert text.count("data:image/png") == 4
