CREATE TABLE users (
    id bigint PRIMARY KEY, name text NOT NULL, email text NOT NULL, updated_at timestamp NOT NULL DEFAULT now());
CREATE TABLE orders (id bigint PRIMARY KEY, user_id bigint NOT NULL);
CREATE TABLE posts (id bigint PRIMARY KEY, slug text NOT NULL UNIQUE);
CREATE TABLE comments (id bigint PRIMARY KEY, post_id bigint NOT NULL, body text);
ALTER TABLE users REPLICA IDENTITY FULL;
ALTER TABLE orders REPLICA IDENTITY FULL;
CREATE UNIQUE INDEX posts_identity ON posts (id, slug);
ALTER TABLE posts REPLICA IDENTITY USING INDEX posts_identity;
ALTER TABLE comments REPLICA IDENTITY FULL;
INSERT INTO users VALUES (42, 'Ada', 'a@example.org'), (43, 'Barbara', 'b@example.org');
INSERT INTO orders VALUES (1, 42);
INSERT INTO posts VALUES (1, 'helo'), (2, 'other');
INSERT INTO comments VALUES (1, 1, 'First'), (2, 2, 'Second');
