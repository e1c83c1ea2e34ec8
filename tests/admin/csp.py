"""The strictest content security policy under which the admin can be served."""

from __future__ import annotations

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def strict(application):
    """The WSGI application, with the policy on everything that it serves."""

    def served(environ, start_response):
        def start(status, headers, exc_info=None):
            return start_response(status, [*headers, ("Content-Security-Policy", POLICY)], exc_info)

        return application(environ, start)

    return served
