"""A shop that rents films: partitions, domains, enums, arrays, aggregates, rules, a last_update everywhere."""

from __future__ import annotations

from alphapulse_encryption_tests.products.product import Product, Write

_TILL = "products_till"
_TOUCHED = ("customer", "customer_note", "address", "staff", "film", "film_actor", "payment")
_VIEWS = {
    "customer_list": """
        CREATE VIEW customer_list AS
            SELECT cu.customer_id AS id, cu.first_name || ' ' || cu.last_name AS name, a.address, a.phone, city.city,
                   CASE WHEN cu.activebool THEN 'active' ELSE '' END AS notes, cu.store_id AS sid
              FROM customer cu JOIN address a USING (address_id) JOIN city USING (city_id);
        GRANT SELECT ON customer_list TO products_till, products_report;""",
    "sales_by_store": """
        CREATE VIEW sales_by_store AS
            SELECT c.city AS store, sum(p.amount) AS total_sales
              FROM payment p JOIN staff USING (staff_id) JOIN store s USING (store_id)
              JOIN address a ON a.address_id = s.address_id JOIN city c USING (city_id) GROUP BY c.city;
        GRANT SELECT ON sales_by_store TO products_till, products_report;""",
    "customer_contact": """
        CREATE VIEW customer_contact AS SELECT customer_id, email FROM customer;
        CREATE RULE customer_contact_changed AS ON UPDATE TO customer_contact
            DO INSTEAD UPDATE customer SET email = NEW.email WHERE customer_id = OLD.customer_id;
        GRANT SELECT ON customer_contact TO products_till, products_report;
        GRANT UPDATE ON customer_contact TO products_till;""",
}

PRODUCT = Product(
    name="rental",
    login="postgres",
    told=(
        *("customer_list", "sales_by_store", "customer_contact", "customer_contact_changed", "idx_last_name"),
        *("film_fulltext_trigger", "get_customer_balance", "address_phone_check", "customer_email_key"),
        *(
            "staff_username_key",
            "payment_amount_check",
            "idx_payment_amount",
            "last_updated",
            "idx_interests",
        ),
    ),
    prepared="""
        DROP TRIGGER film_fulltext_trigger ON film;
        CREATE TRIGGER film_fulltext_trigger BEFORE INSERT OR UPDATE ON film FOR EACH ROW
            EXECUTE FUNCTION tsvector_update_trigger('fulltext', 'pg_catalog.english', 'title');
    """,
    set_aside="".join(f"DROP VIEW {name};" for name in _VIEWS),
    put_back="".join(_VIEWS.values()),
    asked={
        "get_customer_balance": "SELECT get_customer_balance(7, '2022-12-01')",
        "film_in_stock": "SELECT * FROM film_in_stock(7, 1)",
        "rewards_report": "SELECT * FROM rewards_report(1)",
        "last_day": "SELECT last_day('2022-02-01')",
        "film_list": "SELECT * FROM film_list",
        "rental_by_category": "REFRESH MATERIALIZED VIEW rental_by_category",
        "film_fulltext_trigger": "UPDATE film SET title = title || '!' WHERE film_id = 1",
    },
    writes=(
        Write(
            *(_TILL, "insert", "customer", {"customer_id": "10{n}"}),
            {
                **{"store_id": "1", "address_id": "{n}", "first_name": "Née", "last_name": "Smith {n}"},
                **{"email": "NEW.{n}@customer.example", "birth_year": "198{n}", "favourite": "PG-13"},
                "interests": '{tea,"a, \\"b\\"",NULL}',
            },
        ),
        Write(
            *(_TILL, "insert", "customer", {"customer_id": "11{n}"}),
            {
                **{
                    "store_id": "1",
                    "address_id": "{n}",
                    "first_name": "A",
                    "last_name": "B",
                    "interests": "{}",
                },
                "email": "NEW.{n}@customer.example",
            },
        ),
        Write(
            _TILL,
            "update",
            "customer",
            {"customer_id": "7"},
            {"email": "Moved.{n}@customer.example", "birth_year": None},
        ),
        Write(_TILL, "update", "customer", {"customer_id": "8"}, {"store_id": "2"}),
        Write(_TILL, "update", "customer", {"customer_id": "8"}, {"birth_year": "1800"}, checked=True),
        Write(
            _TILL, "insert", "customer_note", {"customer_id": "3", "number": "1{n}"}, {"note": "new '{n}'"}
        ),
        Write(_TILL, "update", "customer_note", {"customer_id": "{n}", "number": "2"}, {"note": ""}),
        Write(_TILL, "delete", "customer_note", {"customer_id": "1{n}", "number": "1"}),
        Write(
            _TILL, "update", "address", {"address_id": "5"}, {"address": "{n} Main St", "phone": "030 {n}"}
        ),
        Write(_TILL, "update", "address", {"address_id": "5"}, {"phone": "call me"}, checked=True),
        Write("products_report", "update", "address", {"address_id": "6"}, {"phone": "1"}),
        Write(
            "postgres",
            "update",
            "staff",
            {"staff_id": "2"},
            {"picture": "\\x000{n}ff", "hired": "[2020-01-0{n},2021-01-01)"},
        ),
        Write("postgres", "update", "staff", {"staff_id": "3"}, {"username": "mike4"}),
        Write(
            _TILL,
            "insert",
            "film",
            {"film_id": "10{n}"},
            {"title": "Return {n}", "description": "dogs {n}", "language_id": "1"},
        ),
        Write(_TILL, "update", "film", {"film_id": "4"}, {"title": "Film four, part {n}"}),
        Write(_TILL, "update", "film_actor", {"actor_id": "2", "film_id": "2"}, {"contract": "part {n}"}),
        Write(
            *(_TILL, "insert", "payment", {"payment_date": "2022-02-1{n} 00:00+00", "payment_id": "10{n}"}),
            {"customer_id": "1", "staff_id": "1", "rental_id": "1", "amount": "{n}.50", "card": "4111 {n}"},
        ),
        # Into another partition.
        Write(
            *(_TILL, "update", "payment", {"payment_id": "10{n}", "payment_date": "2022-02-1{n} 00:00+00"}),
            {"payment_date": "2022-03-1{n} 00:00+00", "amount": "{n}.75"},
        ),
        Write(
            _TILL,
            "update",
            "payment",
            {"payment_id": "{n}", "payment_date": "2022-01-0{n} 00:00+00"},
            {"card": None},
        ),
        Write(_TILL, "update", "payment", {"payment_id": "5"}, {"amount": "-1.00"}, checked=True),
        Write(
            _TILL,
            "insert",
            "rental",
            {"rental_id": "10{n}"},
            {"rental_date": "2022-05-01", "inventory_id": "1", "customer_id": "10{n}", "staff_id": "1"},
        ),
    ),
)
