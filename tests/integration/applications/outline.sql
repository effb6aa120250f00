-- The tables of Outline whose rows its caches show: their keys, and the columns that matter.
CREATE TABLE teams (id text PRIMARY KEY, name text NOT NULL);
CREATE TABLE users (
    id text PRIMARY KEY, "teamId" text NOT NULL REFERENCES teams, name text, role text NOT NULL DEFAULT 'member',
    "suspendedAt" timestamptz, "deletedAt" timestamptz);
CREATE TABLE groups (id text PRIMARY KEY, "teamId" text NOT NULL REFERENCES teams ON DELETE CASCADE, name text);
CREATE TABLE group_users (
    "userId" text REFERENCES users ON DELETE CASCADE, "groupId" text REFERENCES groups ON DELETE CASCADE,
    PRIMARY KEY ("groupId", "userId"));
CREATE TABLE collections (
    id text PRIMARY KEY, "teamId" text NOT NULL REFERENCES teams ON DELETE CASCADE, name text, permission text,
    "documentStructure" jsonb, "archivedAt" timestamptz, "deletedAt" timestamptz);
CREATE TABLE documents (
    id text PRIMARY KEY, "collectionId" text REFERENCES collections ON DELETE CASCADE, title text NOT NULL);
CREATE TABLE user_permissions (
    id text PRIMARY KEY, "userId" text NOT NULL REFERENCES users ON DELETE CASCADE,
    "collectionId" text REFERENCES collections ON DELETE CASCADE,
    "documentId" text REFERENCES documents ON DELETE CASCADE, permission text NOT NULL);
CREATE TABLE group_permissions (
    id text PRIMARY KEY, "groupId" text NOT NULL REFERENCES groups ON DELETE CASCADE,
    "collectionId" text REFERENCES collections ON DELETE CASCADE,
    "documentId" text REFERENCES documents ON DELETE CASCADE, permission text NOT NULL, "deletedAt" timestamptz);
CREATE TABLE comments (
    id text PRIMARY KEY, "documentId" text NOT NULL REFERENCES documents ON DELETE CASCADE, data jsonb NOT NULL,
    "resolvedAt" timestamptz, "deletedAt" timestamptz);
CREATE TABLE revisions (id text PRIMARY KEY, "documentId" text NOT NULL, text text);
CREATE TABLE webhook_subscriptions (
    id text PRIMARY KEY, "teamId" text NOT NULL REFERENCES teams ON DELETE CASCADE, url text NOT NULL,
    enabled boolean NOT NULL DEFAULT true, "deletedAt" timestamptz);
CREATE TABLE integrations (
    id text PRIMARY KEY, "teamId" text NOT NULL REFERENCES teams, service text NOT NULL, "deletedAt" timestamptz);

INSERT INTO teams VALUES ('t', 'Team'), ('o', 'Others');
INSERT INTO users VALUES
    ('ada', 't', 'Ada', 'member'), ('bob', 't', 'Bob', 'viewer'), ('eva', 't', 'Eva', 'guest'), ('oto', 'o', 'Oto', 'admin');
INSERT INTO groups VALUES ('g', 't', 'Gardeners'), ('h', 't', 'Helpers');
INSERT INTO group_users VALUES ('ada', 'g'), ('bob', 'g'), ('bob', 'h'), ('eva', 'h');
INSERT INTO collections VALUES
    ('c', 't', 'Cooking', 'read', '[]'), ('d', 't', 'Diary', NULL, '[]'), ('e', 't', 'Essays', NULL, '[]'),
    ('o', 'o', 'Others', 'read', '[]');
INSERT INTO documents VALUES ('soup', 'c', 'Soup'), ('day', 'd', 'Day'), ('tea', 'e', 'Tea');
INSERT INTO user_permissions VALUES
    ('p1', 'ada', 'd', NULL, 'read'), ('p2', 'eva', NULL, 'soup', 'read'), ('p3', 'eva', 'e', NULL, 'read');
INSERT INTO group_permissions VALUES ('q1', 'g', 'e', NULL, 'read'), ('q2', 'h', NULL, 'day', 'read');
INSERT INTO comments VALUES ('m1', 'soup', '{}'), ('m2', 'soup', '{}'), ('m3', 'day', '{}');
INSERT INTO revisions VALUES ('r1', 'soup', 'a'), ('r2', 'soup', 'b');
INSERT INTO webhook_subscriptions VALUES ('w1', 't', 'https://example.org/'), ('w2', 'o', 'https://example.org/');
INSERT INTO integrations VALUES ('i1', 't', 'github'), ('i2', 't', 'linear'), ('i3', 'o', 'github');

-- What the application would store under which key. Of the members, those of roles that see what the team may see.
CREATE VIEW cached (key, value) AS
SELECT 'cd:' || id, "documentStructure"::text FROM collections
UNION ALL SELECT 'uc:' || users.id, string_agg(DISTINCT collections.id, ',' ORDER BY collections.id)
    FROM users LEFT JOIN collections ON collections."teamId" = users."teamId" AND "archivedAt" IS NULL
    AND collections."deletedAt" IS NULL AND (
        collections.permission IS NOT NULL AND role <> 'guest'
        OR collections.id IN (SELECT "collectionId" FROM user_permissions WHERE "userId" = users.id)
        OR collections.id IN (
            SELECT "collectionId" FROM group_permissions JOIN group_users USING ("groupId")
            WHERE "userId" = users.id AND group_permissions."deletedAt" IS NULL))
    GROUP BY users.id
UNION ALL SELECT 'ud:' || users.id, string_agg(DISTINCT documents.id, ',' ORDER BY documents.id)
    FROM users LEFT JOIN documents ON documents.id IN (
        SELECT "documentId" FROM user_permissions WHERE "userId" = users.id
        UNION SELECT "documentId" FROM group_permissions JOIN group_users USING ("groupId")
        WHERE "userId" = users.id AND group_permissions."deletedAt" IS NULL)
    GROUP BY users.id
UNION ALL SELECT 'whs:' || "teamId", string_agg(url, ',' ORDER BY id)
    FROM webhook_subscriptions WHERE enabled AND "deletedAt" IS NULL GROUP BY "teamId"
UNION ALL SELECT 'count:Group:members:' || groups.id, nullif(count(users.id), 0)::text
    FROM groups LEFT JOIN group_users ON "groupId" = groups.id
    LEFT JOIN users ON users.id = "userId" AND "suspendedAt" IS NULL AND "deletedAt" IS NULL
    GROUP BY groups.id
UNION ALL SELECT 'count:Document:unresolvedComments:' || documents.id, nullif(count(comments.id), 0)::text
    FROM documents LEFT JOIN comments ON "documentId" = documents.id AND "resolvedAt" IS NULL AND "deletedAt" IS NULL
    GROUP BY documents.id
UNION ALL SELECT 'unfurl:' || teams.id || ':https://' || services.service || '.example/' || number,
    string_agg(integrations.id, ',' ORDER BY integrations.id)
    FROM teams CROSS JOIN (VALUES ('github'), ('linear')) AS services (service) CROSS JOIN generate_series(1, 2) number
    LEFT JOIN integrations ON "teamId" = teams.id AND "deletedAt" IS NULL GROUP BY teams.id, services.service, number
UNION ALL SELECT 'diff:' || id, text FROM revisions;
