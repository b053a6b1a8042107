"""A client of an S3-compatible store, and its errors as what a person can do about them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal

from pipelines.errors import Refusal, TryLater
from pipelines.object_storage.settings import S3Settings

if TYPE_CHECKING:
    from botocore.exceptions import ClientError
    from mypy_boto3_s3 import S3Client

CONNECT_TIMEOUT_S = 10.0
_MISSING = {"404", "NoSuchKey", "NotFound"}
_BUSY = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "TooManyRequests", "503"}


def connect(settings: S3Settings, *, concurrent: int = 10, attempts: int | None = None) -> S3Client:
    """A client; nothing is asked of the store yet.

    Args:
        settings: of the store.
        concurrent: requests at a time.
        attempts: instead of the settings', for callers that try again by themselves.

    Raises:
        Refusal: a setting, or boto3's own configuration, cannot be right.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import InvalidRegionError

    if settings.ca_bundle is not None and not settings.ca_bundle.expanduser().is_file():
        raise Refusal(
            "PERCH_S3_CA_BUNDLE",
            f"there is no file {settings.ca_bundle}",
            way_out="name the PEM file of the store's certificate authority, or unset it",
        )
    # Buckets as host names need a wildcard in the DNS, which only AWS can be counted on to have.
    automatic: Literal["path", "auto"] = "path" if settings.endpoint else "auto"
    config = Config(
        connect_timeout=min(CONNECT_TIMEOUT_S, settings.timeout_s),
        read_timeout=settings.timeout_s,
        retries={"mode": "standard", "total_max_attempts": attempts or settings.attempts},
        max_pool_connections=concurrent,
        s3={"addressing_style": automatic if settings.addressing == "auto" else settings.addressing},
    )
    with explained("S3"):
        try:
            return boto3.Session().client(
                "s3",
                endpoint_url=settings.endpoint or None,
                region_name=settings.region or None,
                verify=str(settings.ca_bundle.expanduser()) if settings.ca_bundle else None,
                config=config,
            )
        except InvalidRegionError as error:
            raise Refusal(
                "the region of S3",
                str(error),
                limit="a region's name, e.g. eu-central-1",
                way_out="correct PERCH_S3_REGION, or, where that is unset, AWS_DEFAULT_REGION or boto3's configuration",
            ) from error
        except ValueError as error:  # boto3's word for an endpoint that is no URL
            raise Refusal(
                "PERCH_S3_ENDPOINT_URL", str(error), limit="https://host[:port]", way_out="correct it, or unset it"
            ) from error


def is_missing(error: ClientError) -> bool:
    """Whether the store says that there is no such object."""
    return error.response["Error"].get("Code") in _MISSING


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn boto3's errors into "refused" or "try later".

    Args:
        name: of what is being asked, e.g. "the artifact store s3://releases/".
    """
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConfigParseError,
        CredentialRetrievalError,
        NoCredentialsError,
        ParamValidationError,
        PartialCredentialsError,
        ProfileNotFound,
        SSLError,
    )
    from botocore.parsers import ResponseParserError

    try:
        yield
    except ClientError as error:
        code, message = error.response["Error"].get("Code", ""), error.response["Error"].get("Message", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.TOO_MANY_REQUESTS or code in _BUSY:
            raise TryLater(f"{name} answers {code}: {message}\n  what to do: try again; nothing is lost") from error
        raise Refusal(
            name,
            f"answers {code}: {message}",
            way_out="check the address, PERCH_S3_ENDPOINT_URL, PERCH_S3_REGION, and what the credentials allow",
        ) from error
    except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, ProfileNotFound) as error:
        raise Refusal(
            name,
            f"needs credentials: {error}",
            way_out="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the pod a role",
        ) from error
    except (ParamValidationError, ConfigParseError) as error:  # raised before anything is sent
        raise Refusal(
            name,
            f"cannot be asked: {error}",
            way_out="check the bucket's name in the address, and boto3's own configuration (~/.aws/config)",
        ) from error
    except SSLError as error:
        raise _explain_tls(name, error) from error
    except (BotoCoreError, ResponseParserError) as error:
        raise TryLater(f"{name} cannot be reached: {error}\n  what to do: try again; nothing is lost") from error


def _explain_tls(name: str, error: Exception) -> Exception:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        way_out = "PERCH_S3_CA_BUNDLE names the PEM file of the authority that signed the store's certificate"
    elif "WRONG_VERSION_NUMBER" in text or "record layer failure" in text:
        way_out = "the store speaks no TLS there: write http:// in PERCH_S3_ENDPOINT_URL, or name its other port"
    else:
        return TryLater(f"{name} cannot be reached: {text}\n  what to do: try again; nothing is lost")
    return Refusal(name, f"TLS failed: {text}", way_out=way_out)
