CREATE TABLE users (id bigint PRIMARY KEY, name text NOT NULL, email text NOT NULL UNIQUE, updated_at timestamp);
CREATE TABLE posts (
    id bigint PRIMARY KEY, user_id bigint NOT NULL REFERENCES users ON DELETE CASCADE, slug text NOT NULL,
    title text NOT NULL DEFAULT '', deleted_at timestamp);
CREATE TABLE comments (
    id bigint PRIMARY KEY, commentable_type text NOT NULL, commentable_id bigint NOT NULL, body text NOT NULL DEFAULT '');
CREATE TABLE settings (id bigint PRIMARY KEY, name text NOT NULL UNIQUE, value text);
CREATE TABLE roles (id bigint PRIMARY KEY, name text NOT NULL);
CREATE TABLE permissions (id bigint PRIMARY KEY, name text NOT NULL);
CREATE TABLE role_has_permissions (
    permission_id bigint REFERENCES permissions ON DELETE CASCADE, role_id bigint REFERENCES roles ON DELETE CASCADE,
    PRIMARY KEY (permission_id, role_id));
ALTER TABLE users REPLICA IDENTITY FULL;
ALTER TABLE posts REPLICA IDENTITY FULL;
ALTER TABLE comments REPLICA IDENTITY FULL;
ALTER TABLE settings REPLICA IDENTITY FULL;
INSERT INTO users VALUES (42, 'Ada', 'Ada@example.org'), (43, 'Eva', 'eva@example.org');
INSERT INTO posts VALUES (1, 42, 'hello'), (2, 42, 'bye'), (3, 43, 'other');
INSERT INTO comments VALUES (1, 'App\Models\Post', 1), (2, 'App\Models\Video', 1);
INSERT INTO settings VALUES (1, 'theme', 'dark'), (2, 'title', 'Tea');
INSERT INTO roles VALUES (1, 'editor');
INSERT INTO permissions VALUES (1, 'edit posts');
