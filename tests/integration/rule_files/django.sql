CREATE TABLE blog_author (id bigint PRIMARY KEY, name text NOT NULL);
CREATE TABLE blog_article (
    id bigint PRIMARY KEY, author_id bigint NOT NULL REFERENCES blog_author ON DELETE CASCADE, title text NOT NULL);
CREATE TABLE blog_tag (id bigint PRIMARY KEY, slug text NOT NULL UNIQUE);
CREATE TABLE blog_article_tags (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    article_id bigint NOT NULL REFERENCES blog_article ON DELETE CASCADE,
    tag_id bigint NOT NULL REFERENCES blog_tag ON DELETE CASCADE);
ALTER TABLE blog_article REPLICA IDENTITY FULL;
ALTER TABLE blog_article_tags REPLICA IDENTITY FULL;
ALTER TABLE blog_tag REPLICA IDENTITY FULL;
INSERT INTO blog_author VALUES (7, 'Ada'), (8, 'Barbara');
INSERT INTO blog_article VALUES (42, 7, 'Old'), (43, 7, 'Older'), (44, 8, 'Another');
INSERT INTO blog_tag VALUES (3, 'python'), (4, 'redis'), (5, 'sql');
INSERT INTO blog_article_tags (article_id, tag_id) VALUES (42, 3), (42, 4), (44, 5);
