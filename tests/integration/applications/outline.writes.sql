-- a document is moved in its collection
UPDATE collections SET "documentStructure" = '[{"id": "soup"}]' WHERE id = 'c';

-- a collection becomes private: of all users of the team, some did not see it
-- in vain: 1
UPDATE collections SET permission = NULL WHERE id = 'c';

-- a collection is renamed
UPDATE collections SET name = 'Kitchen' WHERE id = 'c';

-- somebody becomes a member of a collection
INSERT INTO user_permissions VALUES ('p4', 'bob', 'd', NULL, 'read');

-- somebody becomes a member of a document
INSERT INTO user_permissions VALUES ('p5', 'bob', NULL, 'tea', 'read');

-- a membership is given to somebody else
UPDATE user_permissions SET "userId" = 'ada' WHERE id = 'p5';

-- a group may read a collection
INSERT INTO group_permissions VALUES ('q3', 'h', 'c', NULL, 'read');

-- a group may no longer read a collection: softly deleted
UPDATE group_permissions SET "deletedAt" = now() WHERE id = 'q3';

-- somebody joins a group that may read a document
-- in vain: 1
INSERT INTO group_users VALUES ('ada', 'h');

-- a group is deleted, with its members and permissions by a cascade
-- in vain: 2
DELETE FROM groups WHERE id = 'g';

-- somebody gets another role
UPDATE collections SET permission = 'read' WHERE id = 'c';
UPDATE users SET role = 'member' WHERE id = 'eva';

-- somebody is suspended
UPDATE users SET "suspendedAt" = now() WHERE id = 'bob';

-- somebody is renamed
UPDATE users SET name = 'Eva A.' WHERE id = 'eva';

-- somebody is deleted, with memberships by a cascade: a suspended member did not count
-- in vain: 1
DELETE FROM users WHERE id = 'bob';

-- a comment is resolved
UPDATE comments SET "resolvedAt" = now() WHERE id = 'm1';

-- a comment is edited
UPDATE comments SET data = '{"a": 1}' WHERE id = 'm2';

-- a document is deleted, with comments by a cascade
DELETE FROM documents WHERE id = 'day';

-- a webhook, and one that is switched off
INSERT INTO webhook_subscriptions VALUES ('w3', 't', 'https://example.com/');
UPDATE webhook_subscriptions SET enabled = false WHERE id = 'w2';

-- an integration goes
UPDATE integrations SET "deletedAt" = now() WHERE id = 'i2';

-- a revision goes
DELETE FROM revisions WHERE id = 'r1';

-- a collection is deleted, with documents and memberships by a cascade: of all users of the team, some did not see it
-- in vain: 1
DELETE FROM collections WHERE id = 'd';
