-- A shop that rents films: everything in one schema, a last_update on every table, payments partitioned by date.
CREATE TYPE public.mpaa_rating AS ENUM ('G', 'PG', 'PG-13', 'R', 'NC-17');
CREATE DOMAIN public.year AS integer CONSTRAINT year_check CHECK (VALUE BETWEEN 1901 AND 2155);
CREATE FUNCTION public._group_concat(text, text) RETURNS text LANGUAGE sql IMMUTABLE
    AS $$ SELECT CASE WHEN $2 IS NULL THEN $1 WHEN $1 IS NULL THEN $2 ELSE $1 || ', ' || $2 END $$;
CREATE AGGREGATE public.group_concat(text) (SFUNC = public._group_concat, STYPE = text);
CREATE FUNCTION public.last_updated() RETURNS trigger LANGUAGE plpgsql
    AS $$ BEGIN NEW.last_update = CURRENT_TIMESTAMP; RETURN NEW; END $$;

SET search_path = public;
CREATE TABLE country (
    country_id serial PRIMARY KEY,
    country text NOT NULL,
    last_update timestamptz NOT NULL DEFAULT now());
CREATE TABLE city (
    city_id serial PRIMARY KEY,
    city text NOT NULL,
    country_id integer NOT NULL REFERENCES country ON UPDATE CASCADE ON DELETE RESTRICT,
    last_update timestamptz NOT NULL DEFAULT now());
CREATE TABLE address (
    address_id serial PRIMARY KEY,
    address text NOT NULL,
    address2 text,
    district text NOT NULL DEFAULT '',
    city_id integer NOT NULL REFERENCES city ON UPDATE CASCADE ON DELETE RESTRICT,
    postal_code varchar(10),
    phone varchar(20) NOT NULL CONSTRAINT address_phone_check CHECK (phone ~ '^[0-9 ]*$'),
    last_update timestamptz NOT NULL DEFAULT now());
CREATE INDEX idx_fk_city_id ON address (city_id);
CREATE TABLE language (
    language_id serial PRIMARY KEY,
    name character(20) NOT NULL,
    last_update timestamptz NOT NULL DEFAULT now());
CREATE TABLE category (
    category_id serial PRIMARY KEY,
    name text NOT NULL,
    last_update timestamptz NOT NULL DEFAULT now());
CREATE TABLE actor (
    actor_id serial PRIMARY KEY,
    first_name text NOT NULL,
    last_name text NOT NULL,
    last_update timestamptz NOT NULL DEFAULT now());
CREATE TABLE film (
    film_id serial PRIMARY KEY,
    title text NOT NULL,
    description text,
    release_year public.year,
    language_id integer NOT NULL REFERENCES language ON UPDATE CASCADE ON DELETE RESTRICT,
    rental_duration smallint NOT NULL DEFAULT 3,
    rental_rate numeric(4,2) NOT NULL DEFAULT 4.99,
    replacement_cost numeric(5,2) NOT NULL DEFAULT 19.99,
    rating public.mpaa_rating DEFAULT 'G',
    special_features text[],
    fulltext tsvector NOT NULL,
    last_update timestamptz NOT NULL DEFAULT now());
CREATE INDEX film_fulltext_idx ON film USING gist (fulltext);
CREATE INDEX idx_title ON film (title);
CREATE TRIGGER film_fulltext_trigger BEFORE INSERT OR UPDATE ON film
    FOR EACH ROW EXECUTE FUNCTION tsvector_update_trigger('fulltext', 'pg_catalog.english', 'title', 'description');
CREATE TABLE film_actor (
    actor_id integer NOT NULL REFERENCES actor ON UPDATE CASCADE ON DELETE RESTRICT,
    film_id integer NOT NULL REFERENCES film ON UPDATE CASCADE ON DELETE RESTRICT,
    contract text NOT NULL DEFAULT 'as usual',
    last_update timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (actor_id, film_id));
CREATE TABLE film_category (
    film_id integer NOT NULL REFERENCES film,
    category_id integer NOT NULL REFERENCES category,
    last_update timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (film_id, category_id));
CREATE TABLE store (
    store_id serial PRIMARY KEY,
    address_id integer NOT NULL REFERENCES address,
    last_update timestamptz NOT NULL DEFAULT now());
CREATE TABLE staff (
    staff_id serial PRIMARY KEY,
    first_name text NOT NULL,
    last_name text NOT NULL,
    address_id integer NOT NULL REFERENCES address,
    email text,
    store_id integer NOT NULL REFERENCES store,
    active boolean NOT NULL DEFAULT true,
    username text NOT NULL UNIQUE,
    password varchar(40) NOT NULL DEFAULT '',
    picture bytea,
    hired daterange,
    last_update timestamptz NOT NULL DEFAULT now());
ALTER TABLE staff ALTER COLUMN picture SET STORAGE EXTERNAL;
CREATE TABLE customer (
    customer_id serial PRIMARY KEY,
    store_id integer NOT NULL REFERENCES store,
    first_name text NOT NULL,
    last_name text NOT NULL,
    email text,
    address_id integer NOT NULL REFERENCES address,
    activebool boolean NOT NULL DEFAULT true,
    birth_year public.year,
    favourite public.mpaa_rating DEFAULT 'G',
    interests text[] NOT NULL DEFAULT '{}',
    create_date date NOT NULL DEFAULT CURRENT_DATE,
    last_update timestamptz DEFAULT now(),
    CONSTRAINT customer_email_key UNIQUE (email));
CREATE INDEX idx_last_name ON customer (last_name);
CREATE INDEX idx_interests ON customer USING gin (interests);
CREATE TABLE customer_note (
    customer_id integer NOT NULL REFERENCES customer ON DELETE CASCADE,
    number smallint NOT NULL,
    note text COLLATE "C" NOT NULL,
    last_update timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (customer_id, number));
CREATE TABLE inventory (
    inventory_id serial PRIMARY KEY,
    film_id integer NOT NULL REFERENCES film,
    store_id integer NOT NULL REFERENCES store,
    last_update timestamptz NOT NULL DEFAULT now());
CREATE TABLE rental (
    rental_id serial PRIMARY KEY,
    rental_date timestamptz NOT NULL,
    inventory_id integer NOT NULL REFERENCES inventory,
    customer_id integer NOT NULL REFERENCES customer,
    return_date timestamptz,
    staff_id integer NOT NULL REFERENCES staff,
    last_update timestamptz NOT NULL DEFAULT now());
CREATE UNIQUE INDEX idx_unq_rental_rental_date_inventory_id_customer_id
    ON rental (rental_date, inventory_id, customer_id);

CREATE SEQUENCE payment_payment_id_seq;
CREATE TABLE payment (
    payment_id integer NOT NULL DEFAULT nextval('payment_payment_id_seq'),
    customer_id integer NOT NULL,
    staff_id integer NOT NULL,
    rental_id integer NOT NULL,
    amount numeric(5,2) NOT NULL CONSTRAINT payment_amount_check CHECK (amount >= 0),
    card text,
    payment_date timestamptz NOT NULL,
    last_update timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (payment_date, payment_id)) PARTITION BY RANGE (payment_date);
ALTER SEQUENCE payment_payment_id_seq OWNED BY payment.payment_id;
CREATE TABLE payment_p2022_01 PARTITION OF payment FOR VALUES FROM ('2022-01-01 00:00+00') TO ('2022-02-01 00:00+00');
CREATE TABLE payment_p2022_02 PARTITION OF payment FOR VALUES FROM ('2022-02-01 00:00+00') TO ('2022-03-01 00:00+00');
-- This one was a table of its own before, with its columns in another order.
CREATE TABLE payment_p2022_03 (
    payment_date timestamptz NOT NULL,
    payment_id integer NOT NULL DEFAULT nextval('payment_payment_id_seq'),
    once text,
    customer_id integer NOT NULL,
    staff_id integer NOT NULL,
    rental_id integer NOT NULL,
    amount numeric(5,2) NOT NULL CONSTRAINT payment_amount_check CHECK (amount >= 0),
    card text,
    last_update timestamptz NOT NULL DEFAULT now());
ALTER TABLE payment_p2022_03 DROP COLUMN once;
ALTER TABLE payment ATTACH PARTITION payment_p2022_03
    FOR VALUES FROM ('2022-03-01 00:00+00') TO ('2022-04-01 00:00+00');
CREATE INDEX idx_fk_payment_customer_id ON payment (customer_id);
CREATE INDEX idx_payment_amount ON payment (amount);
CREATE INDEX idx_payment_p2022_01_card ON payment_p2022_01 (card) WHERE card IS NOT NULL;
CREATE INDEX idx_payment_p2022_02_card ON payment_p2022_02 (card);
ALTER TABLE payment_p2022_01 ADD CONSTRAINT payment_p2022_01_customer_id_fkey FOREIGN KEY (customer_id) REFERENCES customer;
ALTER TABLE payment_p2022_02 ADD CONSTRAINT payment_p2022_02_customer_id_fkey FOREIGN KEY (customer_id) REFERENCES customer;
ALTER TABLE payment_p2022_03 ADD CONSTRAINT payment_p2022_03_customer_id_fkey FOREIGN KEY (customer_id) REFERENCES customer;

DO $$ DECLARE name text; BEGIN
    FOREACH name IN ARRAY ARRAY['country', 'city', 'address', 'language', 'category', 'actor', 'film', 'film_actor',
            'film_category', 'store', 'staff', 'customer', 'customer_note', 'inventory', 'rental', 'payment'] LOOP
        EXECUTE format('CREATE TRIGGER last_updated BEFORE UPDATE ON %I FOR EACH ROW EXECUTE FUNCTION last_updated()', name);
    END LOOP;
END $$;

CREATE VIEW customer_list AS
    SELECT cu.customer_id AS id, cu.first_name || ' ' || cu.last_name AS name, a.address, a.phone, city.city,
           CASE WHEN cu.activebool THEN 'active' ELSE '' END AS notes, cu.store_id AS sid
      FROM customer cu JOIN address a USING (address_id) JOIN city USING (city_id);
CREATE VIEW film_list AS
    SELECT film.film_id AS fid, film.title, category.name AS category, film.rental_rate AS price, film.rating,
           group_concat(actor.first_name || ' ' || actor.last_name) AS actors
      FROM category JOIN film_category USING (category_id) JOIN film USING (film_id)
      JOIN film_actor USING (film_id) JOIN actor USING (actor_id)
     GROUP BY film.film_id, film.title, category.name, film.rental_rate, film.rating;
CREATE VIEW sales_by_store AS
    SELECT c.city AS store, sum(p.amount) AS total_sales
      FROM payment p JOIN staff USING (staff_id) JOIN store s USING (store_id) JOIN address a ON a.address_id = s.address_id
      JOIN city c USING (city_id) GROUP BY c.city;
CREATE VIEW customer_contact AS SELECT customer_id, email FROM customer;
CREATE RULE customer_contact_changed AS ON UPDATE TO customer_contact
    DO INSTEAD UPDATE customer SET email = NEW.email WHERE customer_id = OLD.customer_id;
CREATE MATERIALIZED VIEW rental_by_category AS
    SELECT c.name AS category, count(*) AS rentals
      FROM rental JOIN inventory USING (inventory_id) JOIN film_category USING (film_id) JOIN category c USING (category_id)
     GROUP BY c.name;
CREATE UNIQUE INDEX rental_category ON rental_by_category (category);

CREATE FUNCTION get_customer_balance(p_customer_id integer, p_effective_date timestamptz) RETURNS numeric
    LANGUAGE plpgsql AS $$
    DECLARE v_fees numeric; v_payments numeric;
    BEGIN
        SELECT coalesce(sum(film.rental_rate), 0) INTO v_fees FROM film JOIN inventory USING (film_id)
          JOIN rental USING (inventory_id)
         WHERE rental.rental_date <= p_effective_date AND rental.customer_id = p_customer_id;
        SELECT coalesce(sum(payment.amount), 0) INTO v_payments FROM payment
         WHERE payment.payment_date <= p_effective_date AND payment.customer_id = p_customer_id;
        RETURN v_fees - v_payments;
    END $$;
CREATE FUNCTION film_in_stock(p_film_id integer, p_store_id integer, OUT p_film_count integer) RETURNS SETOF integer
    LANGUAGE sql AS $$ SELECT inventory_id FROM inventory WHERE film_id = $1 AND store_id = $2 $$;
CREATE FUNCTION last_day(timestamptz) RETURNS date LANGUAGE sql IMMUTABLE STRICT
    AS $$ SELECT (date_trunc('month', $1 AT TIME ZONE 'UTC') + interval '1 month - 1 day')::date $$;
-- It names columns of the table, but not such as are sensitive there.
CREATE FUNCTION rewards_report(min_purchases integer) RETURNS SETOF integer LANGUAGE plpgsql
    AS $$ DECLARE found integer; BEGIN
        FOR found IN EXECUTE 'SELECT customer_id FROM rental GROUP BY 1 HAVING count(*) >= $1 ORDER BY 1' USING min_purchases LOOP
            RETURN NEXT found;
        END LOOP;
    END $$;

GRANT SELECT ON ALL TABLES IN SCHEMA public TO products_till, products_report;
GRANT INSERT, UPDATE, DELETE ON customer, customer_note, address, rental, payment, film, film_actor TO products_till;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO products_till;
GRANT UPDATE ON customer_contact TO products_till;

SET timezone = 'UTC';
INSERT INTO country (country, last_update) SELECT 'Country ' || n, '2022-02-15' FROM generate_series(1, 4) n;
INSERT INTO city (city, country_id, last_update) SELECT 'City ' || n, 1 + n % 4, '2022-02-15' FROM generate_series(1, 10) n;
INSERT INTO address (address, district, city_id, phone, last_update)
    SELECT n || ' Straße der "Freiheit"', CASE WHEN n % 3 > 0 THEN 'District ' || n ELSE '' END, 1 + n % 10,
           CASE WHEN n % 6 > 0 THEN '4915' || 100000 + n ELSE '' END, '2022-02-15'
      FROM generate_series(1, 40) n;
INSERT INTO language (name, last_update) SELECT unnest('{English,Italian,Japanese}'::text[]), '2022-02-15';
INSERT INTO category (name, last_update) SELECT unnest('{Action,Comedy,Drama,Horror}'::text[]), '2022-02-15';
INSERT INTO actor (first_name, last_name, last_update) SELECT 'First' || n, 'Last' || n, '2022-02-15' FROM generate_series(1, 20) n;
INSERT INTO film (title, description, release_year, language_id, rating, special_features, last_update)
    SELECT 'Film ' || n, CASE WHEN n % 5 > 0 THEN 'A thoughtful display of a dog and ' || n || ' monkeys' END, 1990 + n % 30,
           1 + n % 3, (enum_range(NULL::mpaa_rating))[1 + n % 5], CASE WHEN n % 4 > 0 THEN ARRAY['Trailers', 'Deleted "Scenes"'] END,
           '2022-02-15'
      FROM generate_series(1, 30) n;
INSERT INTO film_actor (actor_id, film_id, contract, last_update)
    SELECT 1 + n % 20, 1 + n % 30, 'contract ' || n, '2022-02-15' FROM generate_series(1, 60) n;
INSERT INTO film_category (film_id, category_id, last_update) SELECT n, 1 + n % 4, '2022-02-15' FROM generate_series(1, 30) n;
INSERT INTO store (address_id, last_update) SELECT n, '2022-02-15' FROM generate_series(1, 2) n;
INSERT INTO staff (first_name, last_name, address_id, email, store_id, username, password, picture, hired, last_update)
    SELECT 'Mike' || n, 'Hillyer', n + 2, CASE WHEN n % 3 > 0 THEN 'mike' || n || '@shop.example' END, 1 + n % 2, 'mike' || n, md5('x' || n),
           CASE WHEN n % 2 = 0 THEN decode(md5('picture' || n), 'hex') END, daterange('2020-01-01', '2021-01-01'::date + n), '2022-02-15'
      FROM generate_series(1, 6) n;
INSERT INTO customer (store_id, first_name, last_name, email, address_id, birth_year, favourite, interests, create_date, last_update)
    SELECT 1 + n % 2, 'Mary' || n % 7, 'Smïth ' || n, CASE WHEN n % 9 > 0 THEN 'MARY.' || n || '@customer.example' END, 1 + n % 40,
           CASE WHEN n % 4 > 0 THEN 1950 + n END, (enum_range(NULL::mpaa_rating))[1 + n % 5],
           CASE WHEN n % 3 = 0 THEN '{}' ELSE ARRAY['golf, "chess"', NULL, n::text] END, '2022-02-14', '2022-02-15'
      FROM generate_series(1, 50) n;
INSERT INTO customer_note (customer_id, number, note, last_update)
    SELECT c, n, CASE WHEN n = 3 THEN '' ELSE 'note ' || n || chr(10) || 'of ' || c END, '2022-02-15'
      FROM generate_series(1, 20) c, generate_series(1, 3) n;
INSERT INTO inventory (film_id, store_id, last_update) SELECT 1 + n % 30, 1 + n % 2, '2022-02-15' FROM generate_series(1, 60) n;
INSERT INTO rental (rental_date, inventory_id, customer_id, staff_id, last_update)
    SELECT timestamptz '2022-01-05' + n * interval '1 day', 1 + n % 60, 1 + n % 50, 1 + n % 6, '2022-02-15' FROM generate_series(1, 80) n;
INSERT INTO payment (customer_id, staff_id, rental_id, amount, card, payment_date, last_update)
    SELECT 1 + n % 50, 1 + n % 6, n, (n % 12)::numeric + 0.99, CASE WHEN n % 3 > 0 THEN '4111-1111-' || 1000 + n END,
           timestamptz '2022-01-05' + n * interval '1 day', '2022-02-15'
      FROM generate_series(1, 80) n;
REFRESH MATERIALIZED VIEW rental_by_category;
ANALYZE;
