-- The application's tables; here those of rules/rules.yaml.
CREATE TABLE users (id bigint PRIMARY KEY, name text NOT NULL);
INSERT INTO users SELECT number, 'user ' || number FROM generate_series(1, 100) AS number;
