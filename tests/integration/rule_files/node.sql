CREATE TABLE "User" (id int PRIMARY KEY, email text NOT NULL UNIQUE, name text, "lastSeen" timestamptz);
CREATE TABLE "Post" (
    id int PRIMARY KEY, "authorId" int NOT NULL REFERENCES "User" ON UPDATE CASCADE ON DELETE CASCADE, title text NOT NULL);
CREATE TABLE "Tag" (id int PRIMARY KEY, slug text NOT NULL UNIQUE);
CREATE TABLE "_PostToTag" (
    "A" int NOT NULL REFERENCES "Post" ON UPDATE CASCADE ON DELETE CASCADE,
    "B" int NOT NULL REFERENCES "Tag" ON UPDATE CASCADE ON DELETE CASCADE, PRIMARY KEY ("A", "B"));
CREATE INDEX ON "_PostToTag" ("B");
ALTER TABLE "User" REPLICA IDENTITY FULL;
ALTER TABLE "Post" REPLICA IDENTITY FULL;
ALTER TABLE "Tag" REPLICA IDENTITY FULL;
INSERT INTO "User" VALUES (42, 'Ada@example.org', 'Ada'), (43, 'eva@example.org', 'Eva');
INSERT INTO "Post" VALUES (1, 42, 'Tea'), (2, 42, 'Soup'), (3, 43, 'Rain');
INSERT INTO "Tag" VALUES (3, 'drinks'), (4, 'food'), (5, 'weather');
INSERT INTO "_PostToTag" VALUES (1, 3), (2, 4), (3, 5);
