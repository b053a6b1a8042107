"""The API's description in OpenAPI 3.1, with the model's own labels in its examples."""

from __future__ import annotations

from typing import Any

from pipelines.core.image_decoding import Reason
from pipelines.core.release_unit import ReleaseManifest
from serving import problems
from serving.problems import ProblemType
from serving.settings import ServingSettings

_EXAMPLE_ID = "01KAHM3Z8V5Q0W4T9X2R7N6C1B"
_KEYED = (problems.UNAUTHORIZED, problems.FORBIDDEN, problems.RATE_LIMITED)
_BODIED = (problems.BAD_REQUEST, problems.REQUEST_TIMEOUT, problems.TOO_LARGE, problems.OVERLOADED)
_ANY = (problems.INTERNAL,)
_IMAGE_ENCODING = {"image": {"contentType": "image/png, image/jpeg, image/bmp, image/tiff, image/gif, image/webp"}}

MAX_FORM_PARTS = 8  # of a form with one image; clients add fields of their own


def describe_api(manifest: ReleaseManifest, settings: ServingSettings) -> dict[str, Any]:
    """The OpenAPI document as a JSON tree.

    Args:
        manifest: whose labels and names stand in the examples.
        settings: whose limits stand in the texts.
    """
    limits = (
        f"At most {settings.max_body_bytes:,} bytes and {settings.max_pixels:,} pixels; PNG, JPEG, BMP, TIFF, GIF or "
        "WebP, judged by content."
    )
    image_body = {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {
                            "type": "string",
                            "minLength": 1,
                            "format": "binary",
                            "contentMediaType": "application/octet-stream",
                        }
                    },
                    "maxProperties": MAX_FORM_PARTS,
                },
                "encoding": _IMAGE_ENCODING,
            },
            "image/*": {"schema": {"type": "string", "minLength": 1, "contentMediaType": "image/*"}},
            "application/octet-stream": {"schema": {"type": "string", "minLength": 1, "contentMediaType": "image/*"}},
        },
    }
    images_body = {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {
                            "type": "array",
                            "minItems": 1,
                            "maxItems": settings.max_batch_items,
                            "items": {
                                "type": "string",
                                "format": "binary",
                                "contentMediaType": "application/octet-stream",
                            },
                        }
                    },
                },
                "encoding": _IMAGE_ENCODING,
            }
        },
    }
    image_problems = (
        *_KEYED,
        *_BODIED,
        problems.UNSUPPORTED_MEDIA,
        problems.UNREADABLE_IMAGE,
        problems.TOO_MANY_PIXELS,
        problems.INVALID_FIELD,
        problems.OUT_OF_TIME,
        *_ANY,
    )
    prediction = _prediction_example(manifest)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"{manifest.model} v{manifest.version}",
            "version": "1",
            "description": "Classifies images.  Every answer names the model's version and carries X-Request-ID and "
            "X-Model-Version; every error is RFC 9457 problem+json with a stable `type`.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"apiKey": []}, {"bearer": []}],
        "tags": [{"name": "predictions"}, {"name": "model"}, {"name": "operation"}],
        "paths": {
            "/v1/predict": {
                "post": {
                    "operationId": "predict",
                    "tags": ["predictions"],
                    "summary": "Classify one image",
                    "description": f"The image as the raw body, or as the form field `image`.  {limits}",
                    "parameters": [_request_id()],
                    "requestBody": image_body,
                    "responses": {
                        "200": _answer("The prediction", "Prediction", prediction),
                        **_problem_answers(image_problems),
                    },
                }
            },
            "/v1/predict/batch": {
                "post": {
                    "operationId": "predictBatch",
                    "tags": ["predictions"],
                    "summary": "Classify many images",
                    "description": f"One form field `image` for each, at most {settings.max_batch_items}; the results "
                    f"are in their order, and an image that fails has a problem in its place.  {limits}",
                    "parameters": [_request_id()],
                    "requestBody": images_body,
                    "responses": {
                        "200": _answer("One result for each image", "BatchPrediction", _batch_example(prediction)),
                        **_problem_answers((*_KEYED, *_BODIED, problems.INVALID_FIELD, problems.OUT_OF_TIME, *_ANY)),
                    },
                }
            },
            "/v1/explain": {
                "post": {
                    "operationId": "explain",
                    "tags": ["predictions"],
                    "summary": "Show where the model looked",
                    "description": "A heat map over the image, as PNG: the pixels whose absence changes the "
                    f"probability most.  Takes up to {settings.explain_budget_s:g} s.  {limits}",
                    "parameters": [
                        _request_id(),
                        {
                            "name": "label",
                            "in": "query",
                            "description": "The label to explain; the predicted one when left out.",
                            "schema": {"type": "string", "enum": list(manifest.labels)},
                        },
                    ],
                    "requestBody": image_body,
                    "responses": {
                        "200": {
                            "description": "The heat map",
                            "headers": {
                                **_headers(),
                                "X-Explained-Label": _header("The label that the map explains.", "string"),
                                "X-Explained-Probability": _header("Its probability.", "number"),
                                "X-Explanation-Masks": _header("Masked copies that the model was asked.", "integer"),
                            },
                            "content": {"image/png": {"schema": {"type": "string", "contentMediaType": "image/png"}}},
                        },
                        **_problem_answers(image_problems),
                    },
                }
            },
            "/v1/feedback": {
                "post": {
                    "operationId": "feedback",
                    "tags": ["predictions"],
                    "summary": "Tell the true label of an earlier prediction",
                    "parameters": [_request_id()],
                    "requestBody": {
                        "required": True,
                        "content": {
                            "application/json": {
                                "schema": _reference("Feedback"),
                                "example": {"prediction_id": _EXAMPLE_ID, "true_label": manifest.labels[0]},
                            }
                        },
                    },
                    "responses": {
                        "202": _answer("It is kept", "FeedbackAccepted", {"prediction_id": _EXAMPLE_ID}),
                        **_problem_answers((*_KEYED, *_BODIED, problems.INVALID_FIELD, *_ANY)),
                    },
                }
            },
            "/v1/model": {
                "get": {
                    "operationId": "model",
                    "tags": ["model"],
                    "summary": "What is served, and where it came from",
                    "parameters": [_request_id()],
                    "responses": {
                        "200": _answer("The release's manifest", "Model", manifest.model_dump(mode="json")),
                        **_problem_answers((*_KEYED, *_ANY)),
                    },
                }
            },
            "/livez": {"get": _probe("livez", "Whether the process answers", "alive", ())},
            "/readyz": {"get": _probe("readyz", "Whether requests are welcome", "ready", (problems.NOT_READY,))},
        },
        "components": {
            "securitySchemes": {
                "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
            "schemas": _schemas(manifest),
        },
    }


def _schemas(manifest: ReleaseManifest) -> dict[str, Any]:
    label = {"type": "string", "enum": list(manifest.labels)}
    prediction_id = {"type": "string", "pattern": "^[0-7][0-9A-HJKMNP-TV-Z]{25}$", "description": "A ULID."}
    probability = {"type": "number", "minimum": 0, "maximum": 1}
    probabilities = _object(dict.fromkeys(manifest.labels, probability))
    model = _object({"name": {"type": "string"}, "version": {"type": "string"}})
    predicted = {"prediction_id": prediction_id, "label": label, "probabilities": probabilities}
    index = {"type": "integer", "minimum": 0}
    count = {"type": "integer", "minimum": 0}
    manifest_schema = ReleaseManifest.model_json_schema(
        mode="serialization", ref_template="#/components/schemas/{model}"
    )
    return {
        "Prediction": _object({**predicted, "model": model}),
        "BatchPrediction": _object(
            {
                "model": model,
                "succeeded": count,
                "failed": count,
                "results": {
                    "type": "array",
                    "items": {
                        "oneOf": [
                            _object({"index": index, **predicted}),
                            _object({"index": index, "problem": _reference("Problem")}),
                        ]
                    },
                },
            }
        ),
        "Feedback": _object({"prediction_id": prediction_id, "true_label": label}),
        "FeedbackAccepted": _object({"prediction_id": prediction_id}),
        **manifest_schema.pop("$defs"),
        "Model": manifest_schema,
        "Problem": {
            "type": "object",
            "required": ["type", "title", "status", "detail"],
            "properties": {
                "type": {"type": "string", "enum": [kind.urn for kind in problems.ALL]},
                "title": {"type": "string"},
                "status": {"type": "integer"},
                "detail": {"type": "string"},
                "request_id": {"type": "string", "description": "As in the header X-Request-ID."},
                "reason": {
                    "type": "string",
                    "enum": [str(reason) for reason in Reason],
                    "description": "Why an image was refused.",
                },
                "limit_bytes": {"type": "integer", "description": "Most bytes of a body that is too large."},
            },
        },
        "Status": _object({"status": {"type": "string"}}),
    }


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": list(properties),
        "properties": properties,
        "additionalProperties": False,
    }


def _reference(schema: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{schema}"}


def _header(description: str, kind: str) -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind}}


def _headers() -> dict[str, Any]:
    return {
        "X-Request-ID": _header("The request's own id if it was sane, else a new one.", "string"),
        "X-Model-Version": _header("The version that answered.", "string"),
    }


def _answer(description: str, schema: str, example: Any) -> dict[str, Any]:
    content = {"application/json": {"schema": _reference(schema), "example": example}}
    return {"description": description, "headers": _headers(), "content": content}


def _problem_answers(kinds: tuple[ProblemType, ...]) -> dict[str, Any]:
    """One response per status; several kinds may share one."""
    by_status: dict[int, list[ProblemType]] = {}
    for kind in kinds:
        by_status.setdefault(kind.status, []).append(kind)
    return {str(status): _problem_answer(by_status[status]) for status in sorted(by_status)}


def _problem_answer(kinds: list[ProblemType]) -> dict[str, Any]:
    examples = {
        kind.slug: {
            "value": {
                "type": kind.urn,
                "title": kind.title,
                "status": kind.status,
                "detail": "What is wrong with this request, with the value, the limit and the way out.",
                "request_id": _EXAMPLE_ID,
            }
        }
        for kind in kinds
    }
    headers = _headers()
    if kinds[0].status == problems.UNAUTHORIZED.status:
        headers["WWW-Authenticate"] = _header("What credential is asked for.", "string")
    if kinds[0].status in (429, 503):
        headers["Retry-After"] = _header("Seconds until a new try makes sense.", "integer")
    return {
        "description": "; ".join(kind.title for kind in kinds),
        "headers": headers,
        "content": {problems.MEDIA_TYPE: {"schema": _reference("Problem"), "examples": examples}},
    }


def _request_id() -> dict[str, Any]:
    return {
        "name": "X-Request-ID",
        "in": "header",
        "description": "Comes back with the answer and stands in the logs.",
        "schema": {"type": "string"},
    }


def _probe(operation: str, summary: str, status: str, kinds: tuple[ProblemType, ...]) -> dict[str, Any]:
    return {
        "operationId": operation,
        "tags": ["operation"],
        "summary": summary,
        "security": [],
        "responses": {"200": _answer(summary, "Status", {"status": status}), **_problem_answers(kinds)},
    }


def _prediction_example(manifest: ReleaseManifest) -> dict[str, Any]:
    others = len(manifest.labels) - 1
    probabilities = {label: round(0.08 / others, 4) for label in manifest.labels}
    probabilities[manifest.labels[-1]] = 0.92
    return {
        "prediction_id": _EXAMPLE_ID,
        "label": manifest.labels[-1],
        "probabilities": probabilities,
        "model": {"name": manifest.model, "version": manifest.version},
    }


def _batch_example(prediction: dict[str, Any]) -> dict[str, Any]:
    kind = problems.UNREADABLE_IMAGE
    problem = {"type": kind.urn, "title": kind.title, "status": kind.status, "detail": "The image ends early."}
    result = {name: value for name, value in prediction.items() if name != "model"}
    results = [{"index": 0, **result}, {"index": 1, "problem": problem}]
    return {"model": prediction["model"], "succeeded": 1, "failed": 1, "results": results}
