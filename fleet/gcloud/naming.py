"""Checks every value that becomes an argument of gcloud.

gcloud checks no values: `projects/other/locations/z/nodes/w` given as a name overrides project and zone. So every value
must match a full pattern here, before the first call.
"""

import re

from core.base.errors import UsageError

_NAME = re.compile(r"[a-z](?:[-a-z0-9]{0,38}[a-z0-9])?")
_ZONE = re.compile(r"[a-z]+-[a-z]+[0-9]+-[a-z]")
_PROJECT = re.compile(r"(?:[a-z0-9][-a-z0-9.]*\.[a-z]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]")
_RUNTIME = re.compile(r"[a-z0-9][-a-z0-9._]{0,62}")
_SERVICE_ACCOUNT = re.compile(r"[a-z0-9][-a-z0-9]{0,62}@[a-z0-9][-a-z0-9.]{0,125}[a-z]")
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_SECRET = re.compile(r"[A-Za-z0-9_-]{1,255}")
_BUCKET_URL = re.compile(r"gs://[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9](?:/[^\s]{0,1000})?")
_HOSTS = re.compile(r"all|[0-9]{1,4}")
_MOST_ZONES = 64


def _matched(pattern: re.Pattern[str], text: str, what: str, form: str) -> str:
    if not pattern.fullmatch(text):
        raise UsageError(f"{text!r} is not a valid {what}: {form}")
    return text


def require_name(text: str) -> str:
    """The name of a TPU, or of a fleet, which is the prefix of its TPUs' names."""
    return _matched(_NAME, text, "TPU name", "a letter, then up to 39 of a-z, 0-9 and '-', no '-' at its end")


def require_zone(text: str) -> str:
    """A zone such as us-central1-a."""
    return _matched(_ZONE, text, "zone", "one looks like us-central1-a")


def require_zones(text: str) -> tuple[str, ...]:
    """Zones in the order given, which numbers the workers."""
    zones = tuple(require_zone(zone) for zone in text.split(","))
    if len(set(zones)) < len(zones):
        raise UsageError(f"--zones {text} names a zone twice")
    if len(zones) > _MOST_ZONES:
        raise UsageError(f"--zones names {len(zones)} zones; at most {_MOST_ZONES} are allowed")
    return zones


def require_project(text: str) -> str:
    """A project id."""
    return _matched(_PROJECT, text, "project id", "6 to 30 of a-z, 0-9 and '-'")


def require_runtime(text: str) -> str:
    """A runtime version such as v2-alpha-tpuv5-lite."""
    return _matched(_RUNTIME, text, "runtime version", "one looks like v2-alpha-tpuv5-lite")


def require_service_account(text: str) -> str:
    """The address of a service account."""
    return _matched(_SERVICE_ACCOUNT, text, "service account", "one looks like name@project.iam.gserviceaccount.com")


def require_hosts(text: str) -> str:
    """Which hosts of a TPU: a number or `all`."""
    return _matched(_HOSTS, text, "host of a TPU", "a number from 0, or all")


def require_bucket_url(text: str) -> str:
    """A gs:// URL."""
    return _matched(_BUCKET_URL, text, "URL of a bucket", "one looks like gs://bucket/activations")


def require_secret(text: str) -> tuple[str, str]:
    """VARIABLE=SECRET: an environment variable and the name of the Secret Manager secret that fills it."""
    variable, separator, secret = text.partition("=")
    if not separator:
        raise UsageError("--secret_env needs VARIABLE=NAME_OF_A_SECRET")  # the text may be the secret itself
    if not _VARIABLE.fullmatch(variable) or not _SECRET.fullmatch(secret):
        raise UsageError(f"--secret_env {variable[:64]!r}=...: an upper-case variable and the name of a secret")
    return variable, secret


def require_count(text: str, flag: str, least: int, most: int) -> int:
    """A whole number in plain digits; int() would also take '1_0', ' 1' and digits of other scripts."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise UsageError(f"{flag} {text!r}: a whole number from {least} to {most}")
    return int(text)


def require_seconds(text: str, flag: str, most: float) -> float:
    """A number of seconds, not negative."""
    if not re.fullmatch(r"[0-9]{1,9}(?:\.[0-9]{1,6})?", text) or float(text) > most:
        raise UsageError(f"{flag} {text!r}: seconds from 0 to {most:g}")
    return float(text)
