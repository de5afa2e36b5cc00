"""The former name of :mod:`adjointbackmap.exactness.verification`; it stays for one release."""

from adjointbackmap.exactness.verification import image_hash, merge, verified, verify

__all__ = ["image_hash", "merge", "verified", "verify"]
