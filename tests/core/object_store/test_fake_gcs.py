"""The fake bucket service answers as the JSON API's reference says. Its client here is plain HTTP, or real gcsfs."""

import base64
import hashlib
import json
import struct
import threading
import time
from collections.abc import Iterator

import fsspec.asyn
import google_crc32c
import pytest
import requests
from fake_gcs import CommitThenStatus, CorruptUpload, FakeGcs, PersistPart, Reset, Stall, Status, TruncateBody
from fake_gcs.api import parse_related
from hypothesis import given, settings
from hypothesis import strategies as st

KIB_256 = 256 * 1024


@pytest.fixture
def server() -> Iterator[FakeGcs]:
    with FakeGcs() as fake:
        yield fake


def put(server: FakeGcs, name: str, data: bytes, **query: str | int) -> requests.Response:
    url = f"{server.url}/upload/storage/v1/b/bucket/o"
    return requests.post(url, params={**query, "uploadType": "media", "name": name}, data=data, timeout=10)


def start(server: FakeGcs, name: str, **query: str | int) -> str:
    url = f"{server.url}/upload/storage/v1/b/bucket/o"
    reply = requests.post(url, params={**query, "uploadType": "resumable", "name": name}, json={}, timeout=10)
    assert reply.status_code == 200
    return reply.headers["Location"]


def chunk(location: str, content_range: str, data: bytes = b"") -> requests.Response:
    return requests.put(location, data=data, headers={"Content-Range": content_range}, timeout=10)


def get(server: FakeGcs, path: str, **kwargs: object) -> requests.Response:
    return requests.get(server.url + path, timeout=10, **kwargs)  # type: ignore[arg-type]


def reason(reply: requests.Response) -> str:
    error = reply.json()["error"]
    assert error["code"] == reply.status_code
    return error["errors"][0]["reason"]


def test_metadata_carries_size_generations_and_both_checksums(server: FakeGcs) -> None:
    put(server, "a/b c.bin", b"123456789")
    found = get(server, "/storage/v1/b/bucket/o/a%2Fb%20c.bin").json()
    assert (found["kind"], found["name"], found["bucket"]) == ("storage#object", "a/b c.bin", "bucket")
    assert (found["size"], found["metageneration"]) == ("9", "1")
    assert found["generation"].isdigit()
    assert base64.b64decode(found["crc32c"]) == struct.pack(">I", 0xE3069283)  # the check value of CRC-32C
    assert base64.b64decode(found["md5Hash"]) == hashlib.md5(b"123456789").digest()


def test_each_write_has_a_larger_generation_and_a_patch_only_a_larger_metageneration(server: FakeGcs) -> None:
    first, second = (put(server, "x", b"1").json() for _ in range(2))
    assert int(second["generation"]) > int(first["generation"])
    url = f"{server.url}/storage/v1/b/bucket/o/x"
    patched = requests.patch(url, json={"metadata": {"k": "v"}}, timeout=10).json()
    assert (patched["generation"], patched["metageneration"]) == (second["generation"], "2")
    assert patched["metadata"] == {"k": "v"}
    assert "metadata" not in requests.patch(url, json={"metadata": {"k": None}}, timeout=10).json()


def test_generation_zero_means_create_only_on_every_kind_of_write(server: FakeGcs) -> None:
    put(server, "x", b"old")
    put(server, "y", b"part")
    base, zero = f"{server.url}/storage/v1/b/bucket/o", {"ifGenerationMatch": "0"}
    body = b'--b\r\n\r\n{"name": "x"}\r\n--b\r\n\r\nnew\r\n--b--'
    replies = [
        put(server, "x", b"new", ifGenerationMatch=0),
        requests.post(
            f"{server.url}/upload/storage/v1/b/bucket/o",
            params={"uploadType": "multipart", **zero},
            data=body,
            headers={"Content-Type": "multipart/related; boundary=b"},
            timeout=10,
        ),
        requests.post(
            f"{server.url}/upload/storage/v1/b/bucket/o",
            params={"uploadType": "resumable", "name": "x", **zero},
            timeout=10,
        ),
        requests.post(f"{base}/y/rewriteTo/b/bucket/o/x", params=zero, timeout=10),
        requests.post(f"{base}/y/copyTo/b/bucket/o/x", params=zero, timeout=10),
        requests.post(f"{base}/x/compose", params=zero, json={"sourceObjects": [{"name": "y"}]}, timeout=10),
        requests.delete(f"{base}/x", params=zero, timeout=10),
        requests.patch(f"{base}/x", params=zero, json={}, timeout=10),
        requests.get(f"{base}/x", params=zero, timeout=10),
    ]
    assert [(reply.status_code, reason(reply)) for reply in replies] == [(412, "conditionNotMet")] * len(replies)
    assert server.objects() == {"x": b"old", "y": b"part"}
    assert len(server.generations("x")) == 1


def test_a_matching_generation_is_let_through_and_not_match_is_its_opposite(server: FakeGcs) -> None:
    generation = put(server, "x", b"1").json()["generation"]
    path = "/storage/v1/b/bucket/o/x"
    assert get(server, path, params={"ifGenerationMatch": generation}).status_code == 200
    assert get(server, path, params={"ifGenerationNotMatch": generation}).status_code == 304
    assert put(server, "x", b"2", ifGenerationNotMatch=generation).status_code == 412
    assert put(server, "x", b"2", ifGenerationMatch=generation).status_code == 200
    assert get(server, path, params={"generation": generation}).status_code == 404


def test_of_sixteen_create_only_writers_exactly_one_wins(server: FakeGcs) -> None:
    barrier, codes = threading.Barrier(16), []

    def write(index: int) -> None:
        barrier.wait()
        codes.append(put(server, "x", b"%d" % index, ifGenerationMatch=0).status_code)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200] + [412] * 15
    assert len(server.generations("x")) == 1


def test_missing_things_are_404_with_their_reason(server: FakeGcs) -> None:
    replies = [
        get(server, "/storage/v1/b/bucket/o/none"),
        get(server, "/storage/v1/b/none/o"),
        requests.delete(f"{server.url}/storage/v1/b/bucket/o/none", timeout=10),
        requests.put(f"{server.url}/upload/storage/v1/b/bucket/o?upload_id=none", timeout=10),
    ]
    assert [(reply.status_code, reason(reply)) for reply in replies] == [(404, "notFound")] * 4


@pytest.mark.parametrize(
    ("header", "status", "body", "content_range"),
    [
        ("bytes=0-3", 206, b"0123", "bytes 0-3/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=4-", 206, b"456789", "bytes 4-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=10-", 416, None, "bytes */10"),
        (None, 200, b"0123456789", None),
    ],
)
def test_ranges(
    server: FakeGcs, header: str | None, status: int, body: bytes | None, content_range: str | None
) -> None:
    put(server, "x", b"0123456789")
    headers = {"Range": header} if header else {}
    reply = get(server, "/download/storage/v1/b/bucket/o/x?alt=media", headers=headers)
    assert (reply.status_code, reply.headers.get("Content-Range")) == (status, content_range)
    if body is not None:
        assert reply.content == body
        assert "crc32c=" in reply.headers["X-Goog-Hash"]


def test_listing_pages_through_names_and_prefixes_in_order(server: FakeGcs) -> None:
    for name in ["a/1", "a/2", "b", "c/d/1", "c/e", "z"]:
        put(server, name, b"")
    seen, token = [], None
    while True:
        query = {"delimiter": "/", "maxResults": 2, "pageToken": token}
        page = get(server, "/storage/v1/b/bucket/o", params=query).json()
        entries = page.get("prefixes", []) + [item["name"] for item in page.get("items", [])]
        assert len(entries) <= 2
        seen += entries
        token = page.get("nextPageToken")
        if token is None:
            break
    assert sorted(seen) == ["a/", "b", "c/", "z"]
    flat = get(server, "/storage/v1/b/bucket/o", params={"prefix": "c/", "fields": "items(name)"}).json()
    assert flat == {"items": [{"name": "c/d/1"}, {"name": "c/e"}]}


@settings(max_examples=40, deadline=None)
@given(media=st.binary(max_size=64), newline=st.sampled_from([b"\n", b"\r\n"]))
def test_multipart_media_survives_with_either_line_ending(media: bytes, newline: bytes) -> None:
    lines = [b"--=x=", b"Content-Type: application/json", b"", b'{"name": "n"}', b"--=x=", b"Content-Type: t/s", b""]
    body = newline.join([*lines, media, b"--=x=--"])
    assert parse_related('multipart/related; boundary="=x="', body) == ({"name": "n"}, media, "t/s")


@pytest.mark.parametrize("declared", [{"crc32c": "AAAAAA=="}, {"md5Hash": "AAAA"}])
def test_a_declared_checksum_that_does_not_match_is_400(server: FakeGcs, declared: dict[str, str]) -> None:
    key, value = next(iter(declared.items()))
    header = {"X-Goog-Hash": f"{key.removesuffix('Hash')}={value}"}
    url = f"{server.url}/upload/storage/v1/b/bucket/o"
    body = b"--b\n\n" + json.dumps({"name": "x", **declared}).encode() + b"\n--b\n\ndata\n--b--"
    replies = [
        requests.post(url, params={"uploadType": "media", "name": "x"}, data=b"data", headers=header, timeout=10),
        requests.post(
            url,
            params={"uploadType": "multipart"},
            data=body,
            headers={"Content-Type": "multipart/related; boundary=b"},
            timeout=10,
        ),
    ]
    assert [(reply.status_code, reason(reply)) for reply in replies] == [(400, "invalid")] * 2
    assert server.objects() == {}


def test_a_resumable_upload_appears_only_with_its_last_byte(server: FakeGcs) -> None:
    data = bytes(range(256)) * 1024 * 3  # 768 KiB
    location = start(server, "x", ifGenerationMatch=0)
    assert "Range" not in chunk(location, "bytes */*").headers
    reply = chunk(location, f"bytes 0-{KIB_256 * 2 - 1}/*", data[: KIB_256 * 2])
    assert (reply.status_code, reply.headers["Range"]) == (308, f"bytes=0-{KIB_256 * 2 - 1}")
    assert chunk(location, f"bytes */{len(data)}").headers["Range"] == f"bytes=0-{KIB_256 * 2 - 1}"
    assert server.objects() == {}
    # Sent again from the start: the bytes that are there already are skipped.
    done = chunk(location, f"bytes 0-{len(data) - 1}/{len(data)}", data)
    assert (done.status_code, done.json()["size"]) == (200, str(len(data)))
    again = chunk(location, "bytes */*")
    assert (again.status_code, again.json()["generation"]) == (200, done.json()["generation"])
    assert server.objects() == {"x": data}


def test_a_chunk_that_is_no_multiple_of_256_kib_is_kept_only_up_to_one(server: FakeGcs) -> None:
    location = start(server, "x")
    reply = chunk(location, "bytes 0-299999/*", bytes(300_000))
    assert (reply.status_code, reply.headers["Range"]) == (308, f"bytes=0-{KIB_256 - 1}")


def test_an_empty_resumable_upload_finishes_without_a_chunk(server: FakeGcs) -> None:
    assert chunk(start(server, "x"), "bytes */0").status_code == 200
    assert server.objects() == {"x": b""}


def test_two_resumable_creators_may_start_but_only_one_finishes(server: FakeGcs) -> None:
    first, second = (start(server, "x", ifGenerationMatch=0) for _ in range(2))
    assert chunk(second, "bytes 0-0/1", b"2").status_code == 200
    assert chunk(first, "bytes 0-0/1", b"1").status_code == 412
    assert server.objects() == {"x": b"2"}


def test_a_cancelled_upload_is_gone(server: FakeGcs) -> None:
    location = start(server, "x")
    assert requests.delete(location, timeout=10).status_code == 499
    assert chunk(location, "bytes 0-0/1", b"1").status_code == 404


def test_rewrite_copies_bytes_and_metadata_and_compose_joins_them(server: FakeGcs) -> None:
    put(server, "a", b"one")
    put(server, "b", b"two")
    base = f"{server.url}/storage/v1/b/bucket/o"
    rewritten = requests.post(f"{base}/a/rewriteTo/b/bucket/o/c", timeout=10).json()
    assert (rewritten["done"], rewritten["resource"]["name"], rewritten["objectSize"]) == (True, "c", "3")
    sources = {"sourceObjects": [{"name": "a"}, {"name": "b"}]}
    composed = requests.post(f"{base}/d/compose", json=sources, timeout=10).json()
    assert (composed["componentCount"], "md5Hash" in composed) == (2, False)
    assert struct.unpack(">I", base64.b64decode(composed["crc32c"]))[0] == google_crc32c.value(b"onetwo")
    requests.post(f"{base}/b/moveTo/o/e", timeout=10)
    assert server.objects() == {"a": b"one", "c": b"one", "d": b"onetwo", "e": b"two"}


def test_buckets_are_created_once_and_deleted_when_empty(server: FakeGcs) -> None:
    buckets = f"{server.url}/storage/v1/b"
    assert requests.post(buckets, json={"name": "second"}, timeout=10).status_code == 200
    assert requests.post(buckets, json={"name": "second"}, timeout=10).status_code == 409
    assert [item["name"] for item in get(server, "/storage/v1/b").json()["items"]] == ["bucket", "second"]
    put(server, "x", b"")
    assert requests.delete(f"{buckets}/bucket", timeout=10).status_code == 409
    assert requests.delete(f"{buckets}/second", timeout=10).status_code == 204


def test_batch_deletes_answer_each_part(server: FakeGcs) -> None:
    put(server, "a b", b"")
    part = "\n--B\nContent-Type: application/http\nContent-ID: <p+{}>\n\nDELETE /storage/v1/b/bucket/o/{} HTTP/1.1\n"
    body = part.format(1, "a%20b") + part.format(2, "none") + "\n--B--"
    reply = requests.post(
        f"{server.url}/batch/storage/v1",
        data=body,
        headers={"Content-Type": 'multipart/mixed; boundary="B"'},
        timeout=10,
    )
    assert reply.text.index("HTTP/1.1 204") < reply.text.index("<response-p+2>") < reply.text.index("HTTP/1.1 404")
    assert server.objects() == {}


def test_status_and_reset_do_nothing_and_a_lost_acknowledgement_does_everything(server: FakeGcs) -> None:
    server.faults.add("upload.media", Status(429))
    server.faults.add("upload.media", Reset())
    server.faults.add(("POST", "/upload/"), CommitThenStatus(503))
    assert put(server, "x", b"1").status_code == 429
    with pytest.raises(requests.ConnectionError):
        put(server, "x", b"2")
    assert server.objects() == {}
    assert put(server, "x", b"3", ifGenerationMatch=0).status_code == 503
    assert put(server, "x", b"4", ifGenerationMatch=0).status_code == 412
    assert server.objects() == {"x": b"3"}
    assert [request.status for request in server.requests] == [429, None, 503, 412]


def test_damage_is_on_the_way_in_at_rest_or_at_the_end_of_a_download(server: FakeGcs) -> None:
    server.faults.add("upload.media", CorruptUpload(offset=1))
    put(server, "x", b"aaa")
    assert server.objects() == {"x": b"a`a"}
    server.corrupt("x")
    reply = get(server, "/storage/v1/b/bucket/o/x?alt=media")
    actual = base64.b64encode(struct.pack(">I", google_crc32c.value(reply.content))).decode()
    assert f"crc32c={actual}" not in reply.headers["X-Goog-Hash"]
    server.faults.add("object.media", TruncateBody())
    with pytest.raises(requests.RequestException):
        get(server, "/storage/v1/b/bucket/o/x?alt=media")


def test_part_of_a_chunk_can_be_kept_and_the_rest_asked_for(server: FakeGcs) -> None:
    location = start(server, "x")
    server.faults.add("upload.chunk", PersistPart(KIB_256, 503))
    data = bytes(KIB_256 * 2)
    assert chunk(location, f"bytes 0-{len(data) - 1}/{len(data)}", data).status_code == 503
    assert chunk(location, "bytes */*").headers["Range"] == f"bytes=0-{KIB_256 - 1}"


def test_faults_are_drawn_from_their_seed_and_stalls_end_with_the_server() -> None:
    def drawn() -> list[int]:
        with FakeGcs() as server:
            server.faults.add("object", Status(503), times=None, probability=0.3, seed=5)
            return [get(server, "/storage/v1/b/bucket/o").status_code for _ in range(30)]

    assert drawn() == drawn()
    assert 503 in drawn()
    assert 200 in drawn()
    with FakeGcs() as server:
        server.faults.add("object.list", Stall(60))
        threading.Thread(target=lambda: get(server, "/storage/v1/b/bucket/o"), daemon=True).start()
        deadline = time.monotonic() + 5
        while not server.faults.taken and time.monotonic() < deadline:
            time.sleep(0.01)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5


def test_gcsfs_reads_writes_lists_copies_and_removes(server: FakeGcs) -> None:
    from gcsfs.core import GCSFileSystem

    fs = GCSFileSystem(token="anon", endpoint_url=server.url, use_listings_cache=False, skip_instance_cache=True)
    big = bytes(range(256)) * 4096 * 6  # 6 MiB
    fs.pipe_file("bucket/a/small", b"data\r")
    fs.pipe_file("bucket/a/big", big, chunksize=1 << 20)
    with pytest.raises(FileExistsError):
        fs.pipe_file("bucket/a/small", b"other", mode="create")
    assert fs.cat_file("bucket/a/small") == b"data\r"
    assert fs.cat_file("bucket/a/big", start=255, end=257) == b"\xff\x00"
    with fs.open("bucket/a/big", "rb") as file:
        assert file.read() == big
    fs.cp_file("bucket/a/small", "bucket/b/copy")
    fs.merge("bucket/b/both", ["bucket/a/small", "bucket/b/copy"])
    fs.mv("bucket/b/copy", "bucket/b/moved")
    assert fs.setxattrs("bucket/a/small", key="value") == {"key": "value"}
    assert sorted(fs.find("bucket")) == ["bucket/a/big", "bucket/a/small", "bucket/b/both", "bucket/b/moved"]
    assert fs.ls("bucket") == ["bucket/a", "bucket/b"]
    fs.rm("bucket/a", recursive=True)
    assert server.objects() == {"b/both": b"data\rdata\r", "b/moved": b"data\r"}
    assert fsspec.asyn.sync(fs.loop, fs._rm_files, ["bucket/b/both", "bucket/b/moved"])
    assert server.count("batch") == 1
    assert server.objects() == {}
