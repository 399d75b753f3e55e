"""The web page at /: one file without anything from elsewhere. Its header lets a browser run the script of this file alone."""

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_name("page.html")


def load():
    """Returns (the page as bytes, its headers)."""
    text = PAGE.read_text(encoding="utf-8")
    policy = [
        "default-src 'none'",
        f"script-src '{_digest(text, 'script')}'",
        f"style-src '{_digest(text, 'style')}'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return text.encode(), headers


def _digest(text, tag):
    """The digest of an inline script or style, by which the policy names it."""
    (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
