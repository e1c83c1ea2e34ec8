"""The payment service: another company's program, as far as the shop is concerned.

It knows nothing of Django or of the shop's database. It speaks HTTP, keeps a ledger of its own, fails in the ways
that such services fail, and promises one thing: two requests with one Idempotency-Key make one charge.
"""
