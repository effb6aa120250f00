CREATE TABLE app_user (id bigint PRIMARY KEY, name text NOT NULL);
CREATE TABLE customer_order (id bigint PRIMARY KEY, customer_id bigint NOT NULL, status text NOT NULL);
CREATE TABLE order_line (id bigint PRIMARY KEY, order_id bigint NOT NULL, quantity int NOT NULL);
CREATE TABLE price (region text, sku text, cents int NOT NULL, PRIMARY KEY (region, sku));
INSERT INTO app_user VALUES (42, 'Ada');
INSERT INTO customer_order VALUES (5, 42, 'new'), (6, 43, 'new');
INSERT INTO order_line VALUES (1, 5, 1);
INSERT INTO price VALUES ('eu', 'TEA-1', 450), ('eu', 'TEA-2', 600);
