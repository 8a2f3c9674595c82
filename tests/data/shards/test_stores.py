"""Shards in object stores: the same samples, one line for each fault, no secret in any."""

import http.server
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading

import pytest
import torch
from shard_files import write_shards
from store_server import SECRET, Relay

from vmae.config import MaskConfig
from vmae.data import PretrainDataset, build_loader
from vmae.data.augment_classify import AugmentConfig
from vmae.data.check import check_entries
from vmae.data.classify_dataset import ClassifyDataset, ClipConfig, ViewConfig, ViewDataset
from vmae.data.labels import LabelledList
from vmae.data.manifest import VideoEntry
from vmae.data.mix import read_data
from vmae.data.shards import reading, remote, stores
from vmae.data.shards.entries import ShardError
from vmae.data.shards.index import join_name, read_index
from vmae.errors import InputError
from vmae.synthetic.samples import sample_videos

CLIP = dict(num_frames=4, stride=2, image_size=32, grid=(2, 4, 4), mask=MaskConfig(encoder_ratio=0.75))
CANARY = "canary-7f3a"


def batches(data, workers):
    with build_loader(PretrainDataset(data, **CLIP), batch_size=2, epochs=2, num_workers=workers) as loader:
        return list(loader)


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert [key[:2] for key in one.ids] == [key[:2] for key in other.ids] and not one.replaced
        assert torch.equal(one.clips, other.clips) and torch.equal(one.mask.visible, other.mask.visible)


@pytest.fixture(scope="module")
def local(tmp_path_factory, labelled_world):
    """The index of four videos and two folders of frames in two shards, on this machine."""
    folder = tmp_path_factory.mktemp("shards")
    entries = [VideoEntry(str(sample_videos()[2]), stride=stride) for stride in (None, 1, 3, 4)]
    frames = [VideoEntry(str(labelled_world / name), "frames", start=1, total=10) for name in ("v01", "v02")]
    return write_shards(folder, [*entries[:2], frames[0], *entries[2:], frames[1]])


@pytest.mark.slow  # 11 s: it starts a server
def test_samples_are_those_of_local_shards(store, local, tmp_path):
    """Videos and folders of frames, in workers and in this process, which forks afterwards."""
    address = store.upload(local, "same")
    expected = batches(read_data(local), 0)
    data = read_data(address)
    same(batches(data, 0), expected)
    same(batches(data, 2), expected)
    (copy,) = (tmp_path / "cache/vmae/indexes").glob("*.vmae")
    first = copy.stat().st_ino
    assert remote.fetch_index(address) == copy and copy.stat().st_ino == first


# --- Addresses ---


@pytest.mark.parametrize(
    ("address", "told"),
    [
        (f"https://user:{CANARY}@host/i.vmae", "must hold no credential"),
        (f"https://{CANARY}@host/i.vmae", "must hold no credential"),
        (f"s3://{CANARY}:x@bucket/i.vmae", "must hold no credential"),
        (f"https://host/i.vmae?X-Amz-Signature={CANARY}", "must hold no credential"),
        (f"https://host/{CANARY}?anything", "must hold no credential"),
        (f"s3://b/i?X-Amz-Credential={CANARY}", "must hold no credential"),
        (f"az://c/i?sv=2020&sig={CANARY}", "must hold no credential"),
        (f"s3://b/i?x-amz-security-token={CANARY}", "must hold no credential"),
        ("s3://bucket", "names no object"),
        ("s3:///key", "names no object"),
        ("https://host/", "names no object"),
        ("ftp://host/i.vmae", "ftp:// is no address of an object store; known: s3, gs, az, https"),
        ("https://[::1/i.vmae", "cannot be read"),
        ("http://example.com/i.vmae", "plain http can be read and changed on its way"),
    ],
)
def test_addresses_that_are_refused(address, told):
    with pytest.raises(InputError) as error:
        stores.split_address(address)
    text = str(error.value)
    assert told in text and CANARY not in text and "\n" not in text
    with pytest.raises(InputError) as error:
        read_data(address)
    assert CANARY not in str(error.value)


@pytest.mark.parametrize(
    ("address", "root", "key"),
    [
        ("s3://b/a b/ü%20.tar", "s3://b", "a b/ü%20.tar"),  # keys stand as they are
        ("s3://b/what?.tar", "s3://b", "what?.tar"),
        ("https://h:8080/a%20b/%C3%BC.tar", "https://h:8080", "a b/ü.tar"),
        ("http://127.0.0.1:1/x", "http://127.0.0.1:1", "x"),
        ("http://[::1]:1/x", "http://[::1]:1", "x"),
    ],
)
def test_addresses_in_parts(address, root, key):
    assert stores.split_address(address) == (root, key)


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf", ""])
def test_patience_must_be_seconds(monkeypatch, text):
    monkeypatch.setenv("VMAE_STORE_PATIENCE_S", text)
    for call in (stores.patience, lambda: remote.fetch_index("s3://b/i.vmae")):
        with pytest.raises(InputError, match="VMAE_STORE_PATIENCE_S must be seconds above 0"):
            call()


# --- Faults before a run ---


@pytest.fixture
def hurried(asker):
    """Faults that may pass are given up at once."""
    asker.setattr(remote, "BEFORE_S", 0.01)
    asker.setattr(stores, "QUICK_PAUSE_S", 0.01)
    asker.setenv("AWS_REGION", "us-east-1")
    asker.setenv("AWS_ACCESS_KEY_ID", CANARY)
    asker.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    asker.setenv("AWS_ALLOW_HTTP", "true")
    return asker


def told_of(address):
    with pytest.raises(InputError) as error:
        remote.head(address)
    text = str(error.value)
    assert "\n" not in text and CANARY not in text and SECRET not in text and len(text) < 400
    return text


@pytest.fixture
def answering():
    """`answering(status, body, **headers)`: address of a server that answers so; what real stores send, and
    SeaweedFS does not."""
    servers = []

    def start(status, body=b"", **headers):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def xml(code, more=""):
    return f"<Error><Code>{code}</Code><Message>{CANARY}</Message>{more}</Error>".encode()


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (301, b"", "another region than us-east-1: set AWS_REGION to the bucket's"),
        (400, xml("AuthorizationHeaderMalformed", "<Region>eu-west-1</Region>"), "set AWS_REGION=eu-west-1"),
        (301, xml("PermanentRedirect"), "another region"),
        (400, xml("ExpiredToken"), "the credentials have expired (400 ExpiredToken)"),
        (403, xml("AccessDenied"), "access is refused (403 AccessDenied)"),
        (403, b"", "access is refused (403)"),
        (403, xml("SignatureDoesNotMatch"), "does not know these credentials (403 SignatureDoesNotMatch)"),
        (401, b"", "access is refused (401)"),
        (404, xml("NoSuchBucket"), "there is no such bucket (404 NoSuchBucket)"),
        (404, xml("NoSuchKey"), "there is no such object (404 NoSuchKey)"),
        (200, b"x" * 9, "the server gives no byte ranges"),
        (500, xml("InternalError"), "the store answers 500 InternalError; tried for"),
        (503, xml("SlowDown"), "the store answers 503 SlowDown; tried for"),
        (429, b"", "the store answers 429; tried for"),
        (400, xml("RequestTimeout"), "the store answers 400 RequestTimeout; tried for"),
        (400, xml("Strange"), "the store answers 400 Strange"),
    ],
)
def test_answers_of_stores_are_told_apart(hurried, answering, status, body, told):
    hurried.setenv("AWS_ENDPOINT_URL", answering(status, body))
    text = told_of("s3://bucket/d/index.vmae")
    assert text.startswith("s3://bucket/d/index.vmae: ") and told in text


def test_servers_that_are_not_there_are_told_apart(hurried, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    hurried.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    assert "it cannot be reached (connection refused); tried for" in told_of("s3://bucket/i.vmae")
    hurried.setenv("AWS_ENDPOINT_URL", "http://no-such-host.invalid")
    assert "there is no such host (DNS)" in told_of("s3://bucket/i.vmae")
    hurried.setenv("AWS_ALLOW_HTTP", "false")
    assert "its endpoint is plain http: use https, or set AWS_ALLOW_HTTP" in told_of("s3://bucket/i.vmae")
    hurried.setenv("AWS_CA_BUNDLE", str(tmp_path / "none.pem"))
    assert "none.pem (AWS_CA_BUNDLE or SSL_CERT_FILE): No such file" in told_of("https://localhost/i.vmae")


def test_a_silent_server_is_given_up(hurried):
    with Relay(0, silent=True) as relay:
        hurried.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{relay.port}")
        hurried.setenv("VMAE_STORE_TIMEOUT_S", "0.2")
        assert "no answer came in time (VMAE_STORE_TIMEOUT_S)" in told_of("s3://bucket/i.vmae")


def test_no_account_and_no_obstore(hurried):
    hurried.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    assert "az://c: no account: set AZURE_STORAGE_ACCOUNT_NAME" in told_of("az://c/i.vmae")
    hurried.setitem(sys.modules, "obstore.store", None)
    hurried.setattr(remote, "_asker", None)
    assert "needs obstore: `pip install 'vmae[store]'`" in told_of("s3://bucket/i.vmae")


def test_a_store_needs_a_process_that_was_not_forked_from_one_that_asked(monkeypatch):
    """obstore's threads are not in the child: its first request would wait for ever."""
    monkeypatch.setattr(stores, "_user", os.getpid() + 1)
    with pytest.raises(RuntimeError, match="internal error: .* was forked"):
        stores.store_of("s3://bucket")


def test_the_process_that_asks_is_made_anew_when_it_dies(asker):
    first = remote.ask_apart(os.getpid)
    assert first != os.getpid() and remote.ask_apart(os.getpid) == first
    os.kill(first, 9)
    second = remote.ask_apart(os.getpid)
    assert second not in (first, os.getpid())
    asker.setenv("AWS_REGION", "elsewhere")
    assert remote.ask_apart(os.getenv, "AWS_REGION") == "elsewhere"


# --- A real store: what changes under a run ---


def entries(address):
    """The entries of an index, without the check that a run makes before it begins."""
    return read_index(remote.fetch_index(address), address.rpartition("/")[0])


@pytest.mark.slow
def test_every_kind_of_reader_gives_the_same_bytes(store, local):
    address = store.upload(local, "kinds")
    for one, other in zip(read_index(local), entries(address), strict=True):
        if one.images is None:
            assert reading.read_video(one) == reading.read_video(other)
        else:
            numbers = [0, 3, 9]
            assert reading.read_images(one, numbers) == reading.read_images(other, numbers)


@pytest.mark.slow
def test_plain_web_servers_are_read_by_range(store, local):
    """SeaweedFS' filer, which asks for no key: another code path than S3's, with no ETag in the index."""
    store.upload(local, "a web ü", etags=False)
    address = f"{store.files}/tests/a%20web%20%C3%BC/index.vmae"
    same(batches(read_data(address), 2), batches(read_data(local), 0))
    assert remote.head(address).size == local.stat().st_size
    with pytest.raises(InputError, match="there is no such object .404"):
        remote.head(f"{store.files}/tests/web/other.vmae")
    assert join_name("https://h/d", "a b%.tar") == "https://h/d/a%20b%25.tar"
    assert join_name("s3://b/d", "a b%.tar") == "s3://b/d/a b%.tar"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """(certificate of an authority, certificate and key for localhost)."""
    folder = tmp_path_factory.mktemp("certificates")
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "rsa:2048", "-nodes")
    openssl(*new, "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority")
    openssl(*new, "-keyout", "own.key", "-out", "own.csr", "-subj", "/CN=localhost")
    (folder / "names").write_text("subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n")
    openssl(
        *("x509", "-req", "-in", "own.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
        *("-extfile", "names", "-out", "own.crt", "-days", "9"),
    )
    (folder / "own.pem").write_text((folder / "own.crt").read_text() + (folder / "own.key").read_text())
    return folder / "ca.pem", folder / "own.pem"


@pytest.mark.slow
def test_https(store, local, certificates, asker):
    """Of S3 and of a plain web server; with an authority of one's own, and without."""
    authority, own = certificates
    store.upload(local, "tls")
    expected = batches(read_data(local), 0)
    with Relay(store.port, certificate=own) as s3, Relay(store.ports["filer.port"], certificate=own) as web:
        asker.setenv("AWS_ENDPOINT_URL", f"https://localhost:{s3.port}")
        asker.setenv("AWS_ALLOW_HTTP", "false")
        addresses = (
            "s3://tests/tls/index.vmae",
            f"https://localhost:{web.port}/buckets/tests/tls/index.vmae",
        )
        for address in addresses:
            assert "its certificate is not trusted (TLS); set SSL_CERT_FILE" in told_of(address)
        for name, address in zip(("SSL_CERT_FILE", "AWS_CA_BUNDLE"), addresses, strict=True):
            asker.setenv(name, str(authority))
            same(batches(read_data(address), 2), expected)
            asker.delenv(name)
    asker.setenv("AWS_ENDPOINT_URL", f"https://localhost:{store.port}")
    assert "the server does not speak https (TLS)" in told_of(addresses[0])


@pytest.mark.slow
@pytest.mark.parametrize("etags", [True, False])
def test_shards_that_changed_are_told_before_a_run_and_in_it(store, local, etags):
    folder = f"changed-{etags}"
    address = store.upload(local, folder, etags)
    data = entries(address)
    name = data.relative[1].name
    whole = (local.parent / name).read_bytes()
    store.put(f"tests/{folder}/{name}", whole[:-600])
    with pytest.raises(
        ShardError, match=rf"{name} has {len(whole) - 600} bytes, and its index says {len(whole)}"
    ):
        remote.check_shards(data.shards)
    told = "was changed since its index was made .ETag" if etags else rf"has {len(whole) - 600} bytes"
    for workers in (0, 2):
        with pytest.raises(ShardError, match=rf"{name} {told}"):
            batches(data, workers)
    changed = bytearray(whole)
    place = data[3].video
    changed[place.offset + place.length // 2] ^= 1
    store.put(f"tests/{folder}/{name}", bytes(changed))
    if etags:
        with pytest.raises(ShardError, match=rf"{name} was changed since its index was made .ETag"):
            remote.check_shards(data.shards)
    else:  # as long as before: only its content tells
        remote.check_shards(data.shards)
        with pytest.raises(ShardError, match=rf"{name}: bytes \d+ to \d+ are not those .* .CRC-32"):
            batches(data, 2)
    store.delete(f"tests/{folder}/{name}")
    with pytest.raises(ShardError, match=rf"{name}: there is no such object .404"):
        remote.check_shards(data.shards)
    with pytest.raises(ShardError, match=rf"{name}: there is no such object .404"):
        batches(data, 2)


@pytest.mark.slow
def test_an_answer_that_was_damaged_on_its_way_is_asked_for_again(store, local):
    """A CRC-32 that fails once is no reason to stop; nor is a connection that breaks off."""
    address = store.upload(local, "damaged", etags=False)
    expected = batches(read_data(local), 0)
    for faults in ({"flip_every": 4}, {"fail_every": 3}, {"fail_every": 3, "status": 0}, {"delay_s": 0.1}):
        with Relay(store.port, **faults) as relay:
            data = entries(address)
            for name, value in store.environment(relay.port).items():
                os.environ[name] = value
            same(batches(data, 2), expected)
            assert relay.requests > 10 and (relay.failed or "delay_s" in faults)
        for name, value in store.environment().items():
            os.environ[name] = value


@pytest.mark.slow
def test_a_fetched_index_is_another_one_when_it_changes(store, local):
    address = store.upload(local, "fetched")
    first = remote.fetch_index(address)
    store.put("tests/fetched/index.vmae", local.read_bytes())
    second = remote.fetch_index(address)
    assert first != second and second.read_bytes() == local.read_bytes() and first.exists()
    os.utime(first, (0, 0))
    assert remote.fetch_index(address) == second and not first.exists()
    store.put("tests/fetched/empty.vmae", b"")
    with pytest.raises(InputError, match="it ends within its header"):
        read_index(remote.fetch_index("s3://tests/fetched/empty.vmae"))


@pytest.mark.slow
def test_wrong_keys(store, local):
    address = store.upload(local, "keys")
    os.environ["AWS_SECRET_ACCESS_KEY"] = CANARY
    assert "does not know these credentials (403 SignatureDoesNotMatch)" in told_of(address)
    os.environ["AWS_ACCESS_KEY_ID"] = CANARY
    assert "does not know these credentials (403 InvalidAccessKeyId)" in told_of(address)
    os.environ["AWS_SKIP_SIGNATURE"] = "true"
    try:
        assert "access is refused (403 AccessDenied)" in told_of(address)
    finally:
        del os.environ["AWS_SKIP_SIGNATURE"]


@pytest.mark.slow
def test_each_sample_is_one_request(store, local, asker):
    """What is asked for ahead is what the sample takes, also of folders of frames: nothing is read twice."""
    data = entries(store.upload(local, "counted"))
    clip = ClipConfig(num_frames=4, stride=2, image_size=32)
    labels = LabelledList(list(data), [(0,)] * len(data), 2, False)
    with Relay(store.port) as relay:
        asker.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{relay.port}")
        batches(data, 2)
        assert relay.requests == 2 * len(data)
        views = ViewDataset(list(data), clip, ViewConfig(segments=2, crops=1))
        assert len(list(views.read(range(len(data)), 2))) == len(data)
        assert relay.requests == 3 * len(data)
        dataset = ClassifyDataset(labels, clip, AugmentConfig.none())
        with build_loader(dataset, batch_size=2, epochs=1, num_workers=1) as loader:
            assert len(list(loader)) == 3
        assert relay.requests == 4 * len(data)
        records = check_entries(data, workers=1, progress=False)
        assert not any(record.get("error") for record in records)


@pytest.mark.slow
def test_processes_of_a_machine_fetch_an_index_once(store, asker):
    """The others wait for the one that does, and what a killed one left is removed."""
    content = os.urandom(20_000_000)
    store.put("tests/once/index.vmae", content)
    folder = remote.cache_folder() / "indexes"
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    with Relay(store.port, delay_s=0.1) as relay:
        asker.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{relay.port}")
        with context.Pool(3) as pool:
            found = set(pool.map(remote.fetch_index, ["s3://tests/once/index.vmae"] * 6, chunksize=1))
    (path,) = found
    assert path.read_bytes() == content and relay.bytes < 1.1 * len(content)
    piece = folder / f".{path.name}.99999.unfinished"
    piece.write_bytes(b"half")
    remote.fetch_index("s3://tests/once/index.vmae")
    assert not piece.exists() and len(list(folder.glob("*.vmae"))) == 1
