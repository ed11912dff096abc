"""Objects in an S3 bucket, on AWS or on any server that speaks S3 (SeaweedFS, Ceph, Garage, R2 …).

The SHA-256 of an object travels as metadata and is checked on the way in and out; on the way in the server
checks it too, as the signature covers the body. A body whose connection breaks is read on from where it
broke.
"""

import email.utils
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import structlog
import urllib3
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from contentfactory.errors import (
    ConfigError,
    FactoryError,
    InputError,
    IntegrityError,
    ObjectExists,
    ObjectNotFound,
    ServiceUnavailable,
    StorageError,
)
from storage.base import CHUNK, REFRESH_AFTER_S, Source, StoredObject
from storage.keys import media_type_for, promised_sha256, validate_key, validate_prefix
from storage.signing import check_expires, check_media_type, disposition_and_type
from storage.streams import (
    HashingReader,
    Rejoined,
    buffered,
    check_range,
    download_to,
    opened,
    read_exactly,
    rewindable,
)

MULTIPART_FROM = 16 << 20
"""Bytes above which an object is sent in parts."""
PART = 8 << 20
"""Bytes in a part; more for objects beyond 72 GB, because S3 takes 10,000 parts."""

_PARTS_IN_FLIGHT = 2
_MAX_PARTS = 9_000
_RESUMES = 3
_RACES = 5
_COPY_LIMIT = 5 << 30
_DIGEST = "sha256"
_Parts: TypeAlias = list[dict[str, Any]]
_log = structlog.get_logger(__name__)


class S3Store:
    """A bucket, or what lies under a prefix of it.

    One client serves all threads. Make a store in the process that uses it, not before a fork.

    Args:
        bucket: Name of the bucket; it must exist.
        prefix: Put before every key, such as ``contentfactory``; empty for none.
        endpoint: URL of the server; None for AWS.
        public_endpoint: URL under which others reach the server, for links; None if it is the same.
        region: Region; ``us-east-1`` for a server of one's own where not given.
        access_key: With ``secret_key``: who we are. Without them the usual chain of AWS (environment,
            profile, role) decides.
        secret_key: See ``access_key``.
        session_token: For temporary credentials.
        path_style: Whether the bucket stands in the path rather than in the host name; by default
            wherever ``endpoint`` is given.

    Raises:
        ConfigError: If the endpoint is no URL.
    """

    def __init__(
        self,
        bucket: str,
        *,
        prefix: str = "",
        endpoint: str | None = None,
        public_endpoint: str | None = None,
        region: str | None = None,
        access_key: str | None = None,
        secret_key: str | None = None,
        session_token: str | None = None,
        path_style: bool | None = None,
    ) -> None:
        self.bucket = bucket
        self._prefix = validate_key(prefix.strip("/")) + "/" if prefix.strip("/") else ""
        self._where = f"bucket {bucket!r} at {endpoint or 'AWS'}"
        in_path = path_style if path_style is not None else endpoint is not None
        config = Config(
            signature_version="s3v4",
            connect_timeout=5,
            read_timeout=60,
            retries={"mode": "standard", "total_max_attempts": 4},
            max_pool_connections=32,
            tcp_keepalive=True,
            # Checksums as trailers are news to many servers; a signed body is checked by all of them.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path" if in_path else "auto", "payload_signing_enabled": True},
        )
        try:
            session = Session(
                aws_access_key_id=access_key,
                aws_secret_access_key=secret_key,
                aws_session_token=session_token,
                region_name=region or ("us-east-1" if endpoint else None),
            )
            self._client = session.client("s3", endpoint_url=endpoint, config=config)
            self._linker = (
                session.client("s3", endpoint_url=public_endpoint, config=config)
                if public_endpoint
                else self._client
            )
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(f"object storage cannot be set up: {error}", param="storage_url") from error
        # AWS itself has conditional puts; of others it is found out.
        self._conditional: bool | None = True if endpoint is None else None
        self._probe_lock = threading.Lock()

    def put(
        self, key: str, data: Source, *, media_type: str, sha256: str | None = None, size: int | None = None
    ) -> StoredObject:
        """See ``ObjectStore.put``.

        A stream that cannot seek and whose digest is not given is first copied to a temporary file, because
        the digest goes ahead of the bytes.
        """
        expected = promised_sha256(key, sha256)
        check_media_type(media_type)
        with (
            opened(data) as source,
            nullcontext(source) if expected else rewindable(source, MULTIPART_FROM) as stream,
        ):
            begin = None if expected else stream.tell()
            reader = HashingReader(stream, key, sha256=expected, size=size)
            # One piece more than a single put may have, never joined: it tells small from large at no cost.
            begun = [read_exactly(reader, PART) for _ in range(MULTIPART_FROM // PART)]
            begun.append(reader.read(CHUNK))
            if not begun[-1]:
                return self._put_small(key, b"".join(begun), reader.sha256, media_type)
            held = self.head(key)
            if held is not None or begin is not None:
                reader.drain()
            digest = expected or reader.sha256
            if held is not None:
                return self._settle(held, digest, reader.count)
            if begin is not None:
                size = reader.count
                stream.seek(begin)
                reader = HashingReader(stream, key, sha256=digest, size=size)
                begun = []
            return self._put_large(key, Rejoined(begun, reader), reader, digest, media_type, size or 0)

    def get(self, key: str, *, start: int = 0, end: int | None = None) -> bytes:
        """See ``ObjectStore.get``."""
        with self._reader(key, start, end) as reader:
            return reader.readall()

    def open(self, key: str, *, start: int = 0, end: int | None = None) -> BinaryIO:
        """See ``ObjectStore.open``. Whoever reads all of an object learns from an ``IntegrityError`` that its
        bytes have changed.
        """
        return buffered(self._reader(key, start, end))

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        """See ``ObjectStore.download``."""
        expected = promised_sha256(key, sha256)
        with self._reader(key, 0, None, expected) as reader:
            download_to(path, reader)

    def head(self, key: str) -> StoredObject | None:
        """See ``ObjectStore.head``."""
        name = self._name(key)
        try:
            with self._mapped("look up", key):
                answer = self._client.head_object(Bucket=self.bucket, Key=name)
        except ObjectNotFound:
            return None
        return StoredObject(
            key=key,
            size=answer["ContentLength"],
            sha256=answer["Metadata"].get(_DIGEST),
            media_type=answer.get("ContentType") or "application/octet-stream",
            modified_at=answer["LastModified"].timestamp(),
            etag=answer.get("ETag", "").strip('"') or None,
        )

    def delete(self, keys: Iterable[str]) -> int:
        """See ``ObjectStore.delete``."""
        wanted = iter({self._name(key): None for key in keys})
        gone = 0
        while page := list(islice(wanted, 1000)):
            with self._mapped("delete", f"{len(page)} objects"):
                answer = self._client.delete_objects(
                    Bucket=self.bucket, Delete={"Objects": [{"Key": name} for name in page], "Quiet": True}
                )
            failed = answer.get("Errors", [])
            gone += len(page) - len(failed)
            if failed:
                first = failed[0]
                raise StorageError(
                    f"{len(failed)} of {len(page)} objects were not deleted; the first: {first.get('Key')}: "
                    f"{first.get('Code')} {first.get('Message')}"
                )
        return gone

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See ``ObjectStore.list``."""
        validate_prefix(prefix)
        pages = iter(
            self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._prefix + prefix
            )
        )
        while True:
            with self._mapped("list", prefix):
                page = next(pages, None)
            if page is None:
                return
            for entry in page.get("Contents", ()):
                key = entry["Key"][len(self._prefix) :]
                etag = entry.get("ETag", "").strip('"') or None
                yield StoredObject(
                    key, entry["Size"], None, media_type_for(key), entry["LastModified"].timestamp(), etag
                )

    def presign_get(
        self,
        key: str,
        *,
        expires_s: int,
        filename: str | None = None,
        media_type: str | None = None,
        inline: bool = False,
    ) -> str:
        """See ``ObjectStore.presign_get``."""
        disposition, media_type = disposition_and_type(key, filename, media_type, inline)
        params = {"Bucket": self.bucket, "Key": self._name(key), "ResponseContentDisposition": disposition}
        if media_type:
            params["ResponseContentType"] = media_type
        return self._presign("get_object", params, expires_s)

    def presign_put(self, key: str, *, expires_s: int, media_type: str, size: int) -> str:
        """See ``ObjectStore.presign_put``."""
        if size < 0:
            raise InputError(f"size {size} is negative", param="size")
        params = {
            "Bucket": self.bucket,
            "Key": self._name(key),
            "ContentType": check_media_type(media_type),
            "ContentLength": size,
        }
        return self._presign("put_object", params, expires_s)

    def sweep_temporary(self, older_than_s: float) -> int:
        """See ``ObjectStore.sweep_temporary``: aborts multipart uploads that nobody finished."""
        oldest = time.time() - older_than_s
        removed = 0
        with self._mapped("sweep", "unfinished uploads"):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=self._prefix
            )
            for page in pages:
                for upload in page.get("Uploads", ()):
                    if upload["Initiated"].timestamp() < oldest:
                        self._abort(upload["Key"], upload["UploadId"])
                        removed += 1
        return removed

    def check(self) -> None:
        """See ``ObjectStore.check``."""
        try:
            with self._mapped("reach", self._where):
                self._client.head_bucket(Bucket=self.bucket)
            self._probe()
        except (StorageError, ObjectNotFound) as error:
            raise ServiceUnavailable(error.message) from error

    def close(self) -> None:
        """See ``ObjectStore.close``."""
        self._client.close()
        if self._linker is not self._client:
            self._linker.close()

    def create_bucket(self) -> None:
        """Make the bucket unless it is there: for tests and for a server of one's own."""
        try:
            with self._mapped("make", self._where):
                self._client.create_bucket(Bucket=self.bucket)
        except StorageError as error:
            if not isinstance(error.__cause__, ClientError) or _code(error.__cause__) not in (
                "BucketAlreadyOwnedByYou",
                "BucketAlreadyExists",
            ):
                raise

    def _put_small(self, key: str, body: bytes, sha256: str, media_type: str) -> StoredObject:
        conditional = self._has_conditional_put()
        for _ in range(_RACES):
            if not conditional and (held := self.head(key)) is not None:
                return self._settle(held, sha256, len(body))
            try:
                with self._mapped("write", key):
                    answer = self._client.put_object(
                        Bucket=self.bucket,
                        Key=self._name(key),
                        Body=body,
                        ContentType=media_type,
                        Metadata={_DIGEST: sha256},
                        **({"IfNoneMatch": "*"} if conditional else {}),
                    )
            except ObjectExists:
                if (held := self.head(key)) is not None:
                    return self._settle(held, sha256, len(body))
                continue  # deleted meanwhile, or somebody's write of it is not yet finished
            etag = answer.get("ETag", "").strip('"') or None
            return StoredObject(key, len(body), sha256, media_type, _answered_at(answer), etag)
        raise StorageError(f"object {key} was being written or deleted by others {_RACES} times in a row")

    def _put_large(
        self, key: str, source: Rejoined, reader: HashingReader, sha256: str, media_type: str, size: int
    ) -> StoredObject:
        """Send in parts. Nothing is seen under the key before the last step; nothing stays if a step fails."""
        name = self._name(key)
        with self._mapped("write", key):
            upload = self._client.create_multipart_upload(
                Bucket=self.bucket, Key=name, ContentType=media_type, Metadata={_DIGEST: sha256}
            )["UploadId"]
        try:
            # The reader complains at its end if the bytes are not the promised ones: before the parts become
            # an object.
            parts = self._send_parts(key, upload, source, max(PART, -(-size // _MAX_PARTS)))
            condition = {"IfNoneMatch": "*"} if self._has_conditional_put() else {}
            with self._mapped("write", key):
                self._client.complete_multipart_upload(
                    Bucket=self.bucket,
                    Key=name,
                    UploadId=upload,
                    MultipartUpload={"Parts": parts},
                    **condition,
                )
        except ObjectExists:
            self._abort(name, upload)
        except BaseException:
            self._abort(name, upload)
            raise
        held = self.head(key)
        if held is None:
            raise StorageError(f"object {key} was deleted while it was put")
        return self._settle(held, sha256, reader.count)

    def _send_parts(self, key: str, upload: str, source: Rejoined, part_size: int) -> _Parts:
        """Read part after part, with a few on their way at a time: those and the one being read are in memory."""

        def send(number: int, body: bytes) -> dict[str, Any]:
            with self._mapped("write", key):
                answer = self._client.upload_part(
                    Bucket=self.bucket, Key=self._name(key), UploadId=upload, PartNumber=number, Body=body
                )
            return {"PartNumber": number, "ETag": answer["ETag"]}

        done: _Parts = []
        flying: deque[Future[dict[str, Any]]] = deque()
        with ThreadPoolExecutor(_PARTS_IN_FLIGHT, thread_name_prefix="s3-part") as pool:
            try:
                number = 0
                while True:
                    if len(flying) == _PARTS_IN_FLIGHT:
                        done.append(flying.popleft().result())
                    body = read_exactly(source, part_size)
                    if not body:
                        break
                    number += 1
                    flying.append(pool.submit(send, number, body))
                    del body
                done.extend(future.result() for future in flying)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return done

    def _settle(self, held: StoredObject, sha256: str, size: int) -> StoredObject:
        """Something lies under the key: fine if it is the same."""
        digest = held.sha256
        if held.size == size and digest is None:
            with self._reader(held.key, 0, None) as reader:
                reader.drain()
                digest = reader.sha256
        if (held.size, digest) != (size, sha256):
            raise ObjectExists(f"object {held.key} holds other bytes already")
        if time.time() - held.modified_at > REFRESH_AFTER_S and size < _COPY_LIMIT:
            name = self._name(held.key)
            with self._mapped("refresh", held.key):
                self._client.copy_object(
                    Bucket=self.bucket,
                    Key=name,
                    CopySource={"Bucket": self.bucket, "Key": name},
                    MetadataDirective="REPLACE",
                    ContentType=held.media_type,
                    Metadata={_DIGEST: sha256},
                )
            held = self.head(held.key) or held
        return replace(held, sha256=sha256)

    def _has_conditional_put(self) -> bool:
        if self._conditional is None:
            with self._probe_lock:
                if self._conditional is None:
                    self._conditional = self._probe()
        return self._conditional

    def _probe(self) -> bool:
        """Write, read and delete a small object, and see whether a put with ``If-None-Match: *`` spares it."""
        name = f"{self._prefix}_probe/{secrets.token_hex(8)}"
        with self._mapped("write", name):
            self._client.put_object(Bucket=self.bucket, Key=name, Body=b"1")
        try:
            with self._mapped("write", name):
                self._client.put_object(Bucket=self.bucket, Key=name, Body=b"2", IfNoneMatch="*")
            spared = False
        except ObjectExists:
            spared = True
        except StorageError as error:
            # 'Not implemented' and 'bad request' are answers; a lost connection is none.
            cause = error.__cause__
            if not isinstance(cause, ClientError) or _status(cause) not in (400, 405, 501):
                raise
            spared = False
        with self._mapped("read", name):
            self._client.head_object(Bucket=self.bucket, Key=name)
        with self._mapped("delete", name):
            self._client.delete_object(Bucket=self.bucket, Key=name)
        if not spared:
            _log.warning("storage_without_conditional_put", bucket=self.bucket)
        return spared

    def _reader(self, key: str, start: int, end: int | None, sha256: str | None = None) -> HashingReader:
        check_range(start, end)
        body = _Body(self, key, start, end)
        whole = start == 0 and body.stop == body.total
        return HashingReader(
            body,
            key,
            sha256=(sha256 or body.sha256) if whole else None,
            size=body.stop - start,
            close_source=True,
        )

    def _presign(self, operation: str, params: dict[str, Any], expires_s: int) -> str:
        check_expires(expires_s)
        with self._mapped("sign a link to", str(params["Key"])):
            return str(self._linker.generate_presigned_url(operation, Params=params, ExpiresIn=expires_s))

    def _abort(self, name: str, upload: str) -> None:
        # What cannot be aborted now is swept later; the first error is the one to tell.
        with suppress(BotoCoreError, ClientError):
            self._client.abort_multipart_upload(Bucket=self.bucket, Key=name, UploadId=upload)

    def _name(self, key: str) -> str:
        return self._prefix + validate_key(key)

    @contextmanager
    def _mapped(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            raise self._of_answer(error, action, key) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise ServiceUnavailable(
                f"no credentials for {self._where}: set the storage access key and secret key, or the environment of AWS"
            ) from error
        except (BotoCoreError, urllib3.exceptions.HTTPError, OSError) as error:
            raise StorageError(f"cannot {action} {key} in {self._where}: {error}") from error

    def _of_answer(self, error: ClientError, action: str, key: str) -> FactoryError:
        code, status = _code(error), _status(error)
        told = f"cannot {action} {key} in {self._where}: {status} {code}"
        if code == "NoSuchBucket" or (status == 404 and error.operation_name == "HeadBucket"):
            return ServiceUnavailable(f"{told}; make the bucket, or name another in storage_url")
        if code == "NoSuchUpload":
            return StorageError(f"{told}; the upload was swept or aborted")
        if status == 404:
            return ObjectNotFound(f"no object {key}")
        if status in (409, 412) and code in (
            "PreconditionFailed",
            "ConditionalRequestConflict",
            "412",
            "409",
        ):
            return ObjectExists(told)
        if code in ("XAmzContentSHA256Mismatch", "BadDigest", "InvalidDigest"):
            return IntegrityError(f"{told}; the bytes changed on their way")
        if code in ("RequestTimeTooSkewed",):
            return ServiceUnavailable(f"{told}; set this machine's clock")
        if status in (401, 403):
            return ServiceUnavailable(
                f"{told}; check the storage access key, its secret and what they may do"
            )
        if status == 507 or code in ("InsufficientStorage", "XMinioStorageFull", "QuotaExceeded"):
            return ServiceUnavailable(f"{told}; the storage is full")
        if status in (301, 307):
            return ServiceUnavailable(f"{told}; the bucket lies in another region, name it in storage_url")
        return StorageError(told)


class _Body:
    """The bytes of an object from ``start`` on; where the connection breaks it is opened again at that place."""

    def __init__(self, store: S3Store, key: str, start: int, end: int | None) -> None:
        self._store = store
        self._key = key
        self._at = start
        self._end = end
        self._etag: str | None = None
        self._stream: Any = None
        self._resumes = 0
        self.stop = self.total = start
        self.sha256: str | None = None
        if start == end:
            held = store.head(key)
            if held is None:
                raise ObjectNotFound(f"no object {key}")
            self.total = held.size
        else:
            self._open()

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes."""
        if self._at >= self.stop:
            return b""
        if size < 0:
            size = self.stop - self._at
        while True:
            try:
                with self._store._mapped("read", self._key):
                    if self._stream is None:
                        self._open()
                    data: bytes = self._stream.read(min(size, self.stop - self._at))
                    if not data:
                        raise StorageError(
                            f"object {self._key}: the answer ended {self.stop - self._at} bytes early"
                        )
                self._at += len(data)
                return data
            except StorageError:
                if self._resumes == _RESUMES:
                    raise
                self._resumes += 1
                self.close()
                time.sleep(0.1 * 2**self._resumes)

    def close(self) -> None:
        """Give the connection back, or drop it if bytes are still on their way."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open(self) -> None:
        store = self._store
        extra = {}
        if self._at or self._end is not None:
            extra["Range"] = f"bytes={self._at}-{'' if self._end is None else self._end - 1}"
        if self._etag:
            extra["IfMatch"] = self._etag
        try:
            with store._mapped("read", self._key):
                answer = store._client.get_object(Bucket=store.bucket, Key=store._name(self._key), **extra)
        except ObjectExists:
            raise IntegrityError(f"object {self._key} was changed while it was read") from None
        except StorageError as error:
            if isinstance(error.__cause__, ClientError) and _status(error.__cause__) == 416:
                return  # beyond the end: empty
            raise
        self._stream = answer["Body"]
        if self._etag is None:
            self._etag = answer.get("ETag")
            self.sha256 = answer["Metadata"].get(_DIGEST)
            length = answer["ContentLength"]
            self.stop = self._at + length
            span = answer.get("ContentRange", "").rpartition("/")[2]
            self.total = int(span) if span.isdigit() else length


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _answered_at(answer: dict[str, Any]) -> float:
    """The server's own time, which the object got as its date; else ours."""
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    with suppress(TypeError, ValueError):
        return email.utils.parsedate_to_datetime(date).timestamp()
    return time.time()
