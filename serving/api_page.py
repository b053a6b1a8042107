"""The page at `/`, to read the API and try it: Swagger UI as it comes with BentoML, and nothing from elsewhere.

BentoML's own page loads a tag manager from a third party; whoever tries an image here tells nobody else.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape

from pipelines.core.release_unit import ReleaseManifest

_START = 'SwaggerUIBundle({url: "docs.json", dom_id: "#swagger-ui", deepLinking: true, tryItOutEnabled: true});'
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="static_content/favicon-light-32x32.png">
<link rel="stylesheet" href="static_content/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="static_content/swagger-ui-bundle.js"></script>
<script>{start}</script>
</body>
</html>
"""


def render_api_page(manifest: ReleaseManifest) -> tuple[bytes, dict[str, str]]:
    """The page and its headers, by which a browser loads nothing from anywhere else.

    Args:
        manifest: whose name and version head it.
    """
    page = _PAGE.format(title=escape(f"{manifest.model} v{manifest.version}"), start=_START)
    digest = base64.b64encode(hashlib.sha256(_START.encode()).digest()).decode()
    policy = (
        f"default-src 'self'; script-src 'self' 'sha256-{digest}'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    return page.encode(), {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
