-- The shop's tables, as cdc_invalidator/embedded/shop.py makes them.
CREATE TABLE users (
    id bigint PRIMARY KEY, name text NOT NULL, email text NOT NULL, plan text NOT NULL,
    last_seen timestamptz NOT NULL DEFAULT now());
CREATE TABLE products (id bigint PRIMARY KEY, name text NOT NULL, price_cents integer NOT NULL);
CREATE TABLE orders (
    id bigserial PRIMARY KEY,
    user_id bigint NOT NULL REFERENCES users ON UPDATE CASCADE ON DELETE CASCADE,
    product_id bigint NOT NULL, quantity integer NOT NULL, status text NOT NULL);
CREATE INDEX ON orders (user_id);
CREATE INDEX ON orders (product_id);
CREATE TABLE reviews (
    id bigserial PRIMARY KEY, product_id bigint NOT NULL, stars integer NOT NULL, body text NOT NULL);
CREATE INDEX ON reviews (product_id);
ALTER TABLE users REPLICA IDENTITY FULL;
ALTER TABLE orders REPLICA IDENTITY FULL;
INSERT INTO users (id, name, email, plan)
SELECT n, 'user ' || n, 'user' || n || '@shop.example', 'free' FROM generate_series(1, 50) n;
INSERT INTO products SELECT n, 'product ' || n, n FROM generate_series(1, 2000) n;
INSERT INTO orders (user_id, product_id, quantity, status) VALUES (7, 3, 1, 'paid'), (9, 3, 1, 'paid'), (8, 4, 1, 'paid');
INSERT INTO reviews (product_id, stars, body) VALUES (3, 5, 'good'), (4, 1, 'bad');
