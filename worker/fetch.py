"""Fetch an input from an address that a user gave, within caps on bytes and time."""

import hashlib
import os
import time
from pathlib import Path

import httpx

from contentfactory import net
from contentfactory.errors import InputError, TransientError
from storage.keys import suffix_for
from worker.input_file import InputFile


def fetch_url(url: str, folder: Path, *, max_bytes: int, timeout_s: float, allow_private: bool = False) -> InputFile:
    """Download an address into a folder.

    Args:
        url: http(s) address.
        folder: Where to put the file, named by its SHA-256.
        max_bytes: Most bytes taken.
        timeout_s: Longest time for the whole download, seconds.
        allow_private: Whether private addresses are allowed.

    Raises:
        InputError: If the address is refused, answers with an error of the caller's, or is too large.
        TransientError: If it did not answer in time or answered 5xx or 429.
    """
    parsed = net.check_url(url)
    shown = f"{parsed.scheme}://{parsed.host}{parsed.path}"[:120]
    end = time.monotonic() + timeout_s
    part = folder / f".fetch-{os.getpid()}-{time.monotonic_ns()}"
    digest, size = hashlib.sha256(), 0
    try:
        with net.client(timeout_s=timeout_s, allow_private=allow_private, total_s=timeout_s) as client, client.stream("GET", parsed) as answer:
            if answer.status_code in (408, 425, 429) or answer.status_code >= 500:
                raise TransientError(f"{shown} answered {answer.status_code}", code="fetch")
            if answer.status_code != 200:
                raise InputError(f"{shown} answered {answer.status_code}", code="fetch")
            length = answer.headers.get("content-length", "")
            if length.isdigit() and int(length) > max_bytes:
                raise InputError(f"{shown} has {length} bytes; at most {max_bytes} are taken", code="too_large")
            media_type = answer.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
            with open(part, "wb") as out:
                # As it comes: collecting whole blocks would let a dripping server hold this loop.
                for block in answer.iter_raw():
                    size += len(block)
                    if size > max_bytes:
                        raise InputError(f"{shown} has more than {max_bytes} bytes", code="too_large")
                    if time.monotonic() > end:
                        raise TransientError(f"{shown} took longer than {timeout_s:.0f} s", code="fetch")
                    digest.update(block)
                    out.write(block)
        if not size:
            raise InputError(f"{shown} is empty", code="fetch")
        path = folder / f"{digest.hexdigest()}{suffix_for(media_type)}"
        os.replace(part, path)
    except httpx.TooManyRedirects:
        raise InputError(f"{shown} redirects more than {net.MAX_REDIRECTS} times", code="fetch") from None
    except httpx.UnsupportedProtocol as error:
        raise InputError(f"{shown} redirects to something that is not http(s): {error}", code="bad_url") from None
    except (httpx.InvalidURL, UnicodeError) as error:
        raise InputError(f"{shown} redirects to a malformed address: {str(error)[:100]}", code="bad_url") from None
    except httpx.RemoteProtocolError as error:
        if "disconnected" in str(error) or "closed" in str(error):
            raise TransientError(f"{shown} broke off", code="fetch") from None
        raise InputError(f"{shown} does not answer in HTTP: {str(error)[:100]}", code="fetch") from None
    except httpx.HTTPError as error:
        raise TransientError(f"{shown} did not answer: {type(error).__name__}", code="fetch") from None
    finally:
        part.unlink(missing_ok=True)
    return InputFile(path, media_type, parsed.path.rpartition("/")[2][:100] or parsed.host)
