"""Reading and fetching the published curves: made-up files in their format; nothing here needs the network."""

import hashlib
import json

import numpy as np
import pytest

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.laws import published
from sparsity_utils.laws.published import PUBLISHED_LAWS


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Eleven files that follow the printed laws, taken for the published ones."""
    monkeypatch.setattr(published, "SHA256", {})
    for law in PUBLISHED_LAWS:
        tokens = np.linspace(5, 100, 20 + law.n_layers) * 1e9
        write(tmp_path / published.file_name(law), tokens, law.predict(tokens))
    return tmp_path


def write(file, tokens, ratio, keys=published.KEYS):
    file.write_text(json.dumps(dict(zip(keys, (list(tokens), list(ratio)), strict=True))))
    published.SHA256[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()


def test_every_published_law_has_a_file_with_a_checksum():
    assert set(published.SHA256) == {published.file_name(law) for law in PUBLISHED_LAWS}
    assert len(set(published.SHA256.values())) == 11
    assert all(len(bytes.fromhex(value)) == 32 for value in published.SHA256.values())
    assert published.COMMIT in published.ADDRESS


def test_curves_come_tidy(folder):
    table = published.read_curves(folder)
    assert list(table.columns) == ["activation", "model", "tokens", "activation_ratio"]
    sizes = table.groupby(["activation", "model"]).size()
    assert sizes.to_dict() == {(law.activation, law.model): 20 + law.n_layers for law in PUBLISHED_LAWS}
    law = PUBLISHED_LAWS[-1]
    curve = table.query("activation == 'silu' and model == '1.2B'")
    np.testing.assert_allclose(curve["activation_ratio"], law.predict(curve["tokens"]))


NAME = "0.4b_silu.txt"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), r"There is no 0\.4b_silu\.txt in .*; name a folder with the files data/"),
        (
            lambda file: file.write_text("{"),
            r"0\.4b_silu\.txt is no JSON with the lists token_passed and activation_ra",
        ),
        (lambda file: file.write_bytes(b"\xff\xfe"), "is no JSON with the lists"),
        (lambda file: file.write_text("[1, 2]"), "is no JSON with the lists"),
        (lambda file: write(file, [1], [0.1], ("tokens", "activation_ratio")), "is no JSON with the lists"),
        (lambda file: write(file, [1, 2, 3], [0.1, 0.2]), "has 3 numbers of tokens and 2 activation ratios; get"),
        (lambda file: write(file, [], []), "has 0 numbers of tokens"),
        (lambda file: write(file, [1, 2], [0.1, float("nan")]), "holds NaN or infinity"),
        (lambda file: write(file, [1, 2, 2], [0.1, 0.2, 0.3]), "names a number of tokens twice"),
        (lambda file: write(file, [2, 1], [0.1, 0.2]), "or not in rising order"),
        (lambda file: write(file, [1, 2], [10, 20]), "activation ratios outside 0 to 1"),
        (lambda file: file.write_text(file.read_text() + "\n"), r"is not the published file \(SHA-256"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(folder, spoil, message):
    spoil(folder / NAME)
    with pytest.raises(InputError, match=message) as error:
        published.read_curves(folder)
    assert str(error.value).count(". ") == 0


@pytest.fixture
def server(folder, tmp_path_factory, monkeypatch):
    """The repository on a port of this machine, and a build folder of the test's own."""
    import threading
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path_factory.mktemp("build")))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=folder)) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        monkeypatch.setattr(published, "ADDRESS", f"http://127.0.0.1:{web.server_port}/")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield folder
        web.shutdown()


def test_a_download_is_kept_and_not_repeated(server, capfd):
    target = published.download_curves()
    assert target == paths.published_curves() and len(list(target.glob("*.txt"))) == 11
    for file in server.glob("*.txt"):
        file.unlink()
    assert published.download_curves() == target
    assert len(published.read_curves(target)) == sum(20 + law.n_layers for law in PUBLISHED_LAWS)
    assert str(target) not in "".join(capfd.readouterr())


def test_a_download_of_something_else_is_refused_and_not_kept(server):
    (server / NAME).write_text("{}")
    with pytest.raises(
        InputError, match=r"0\.4b_silu\.txt could not be fetched \(ValueError\); get the folder data/ of"
    ):
        published.download_curves()
    assert not (paths.published_curves() / NAME).exists()


def test_a_file_that_is_not_there_is_an_input_error(server):
    (server / NAME).unlink()
    with pytest.raises(InputError, match=r"could not be fetched \(HTTPError\)"):
        published.download_curves()
