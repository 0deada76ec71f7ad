"""A shop in two services, each with its own database, whose money always agrees.

    shop ──"wanted"──▶ order service ──"placed"──▶ payment service ──"paid"──▶ order service

"placed" and "paid" are two-phase messages: each is delivered if, and only if, the database transaction of its
sender committed, also when the sender dies in between. Read `orders.py`, `payments.py`, then `service.py`.
"""
