-- The tables of Zulip whose rows its caches show: their keys, and the columns that matter.
CREATE TABLE zerver_realm (
    id int PRIMARY KEY, string_id text NOT NULL UNIQUE, name text NOT NULL, first_visible_message_id int NOT NULL DEFAULT 0);
CREATE TABLE zerver_recipient (id int PRIMARY KEY, type_id int NOT NULL, type smallint NOT NULL);
CREATE TABLE zerver_userprofile (
    id int PRIMARY KEY, realm_id int NOT NULL REFERENCES zerver_realm DEFERRABLE INITIALLY DEFERRED, email text NOT NULL,
    full_name text NOT NULL, api_key text NOT NULL UNIQUE, is_active boolean NOT NULL DEFAULT true,
    is_bot boolean NOT NULL DEFAULT false);
CREATE TABLE zerver_subscription (
    id int PRIMARY KEY, user_profile_id int NOT NULL REFERENCES zerver_userprofile DEFERRABLE INITIALLY DEFERRED,
    recipient_id int NOT NULL REFERENCES zerver_recipient DEFERRABLE INITIALLY DEFERRED);
CREATE TABLE zerver_stream (
    id int PRIMARY KEY, realm_id int NOT NULL REFERENCES zerver_realm DEFERRABLE INITIALLY DEFERRED, name text NOT NULL,
    description text NOT NULL DEFAULT '');
CREATE TABLE zerver_alertword (
    id int PRIMARY KEY, realm_id int NOT NULL REFERENCES zerver_realm DEFERRABLE INITIALLY DEFERRED,
    user_profile_id int NOT NULL REFERENCES zerver_userprofile DEFERRABLE INITIALLY DEFERRED, word text NOT NULL);
CREATE TABLE zerver_message (id int PRIMARY KEY, sender_id int NOT NULL, content text NOT NULL);
CREATE TABLE zerver_reaction (
    id int PRIMARY KEY, message_id int NOT NULL REFERENCES zerver_message DEFERRABLE INITIALLY DEFERRED,
    user_profile_id int NOT NULL, emoji_name text NOT NULL);
CREATE TABLE zerver_submessage (
    id int PRIMARY KEY, message_id int NOT NULL REFERENCES zerver_message DEFERRABLE INITIALLY DEFERRED, content text NOT NULL);

INSERT INTO zerver_realm VALUES (1, 'lab', 'Lab'), (2, 'works', 'Works');
INSERT INTO zerver_recipient VALUES (1, 1, 3), (2, 2, 3);
INSERT INTO zerver_userprofile VALUES
    (1, 1, 'ada@example.org', 'Ada', 'key-1', true, false), (2, 1, 'bot@example.org', 'Bot', 'key-2', true, true),
    (3, 1, 'eva@example.org', 'Eva', 'key-3', true, false), (4, 2, 'ada@example.com', 'Ada', 'key-4', true, false);
INSERT INTO zerver_subscription VALUES (1, 1, 1), (2, 3, 1), (3, 2, 2), (4, 3, 2);
INSERT INTO zerver_stream VALUES (1, 1, 'Tea'), (2, 1, 'Coffee'), (3, 2, 'Tea');
INSERT INTO zerver_alertword VALUES (1, 1, 1, 'tea'), (2, 2, 4, 'tea');
INSERT INTO zerver_message VALUES (1, 1, 'Tea?'), (2, 3, 'Yes');
INSERT INTO zerver_reaction VALUES (1, 2, 1, 'tada');

-- PostgreSQL has no SHA-1 (without pgcrypto).
CREATE TABLE hashes (of text PRIMARY KEY, sha1 text NOT NULL);
INSERT INTO hashes VALUES
    ('ada@example.org', '3c1b5f0cb91772d027dcdde8fb749091db780cbb'),
    ('bot@example.org', 'e2e9ec9705b4919b6aa6e4b1464f5dcb60af9c4f'),
    ('bot2@example.org', '84e74b7794581b1efa1ae8a44687d11e321268a9'),
    ('eva@example.org', '99ff3f9d7e9461357179e15ce5b01a86a25e8bf1'),
    ('eva@example.com', '7ee0574eee4e5faccbba6fe89f2530504b16b662'),
    ('ada@example.com', '3ca93ad87e0bb737e653b66ad67731e86bbc050f'),
    ('tea', '75490f32c06a50051804339453d3fe2f0cd5564b'),
    ('coffee', '44213f9f4d59b557314fadcd233232eebcac8012'),
    ('tea time', '43396b06dbd8637d53b10a1d74162c5b6a4853a7');

-- A user as it is cached: with its realm.
CREATE VIEW whole AS
SELECT u.*, u::text || r::text AS value FROM zerver_userprofile u JOIN zerver_realm r ON r.id = realm_id;

-- What the application would store under which key.
CREATE VIEW cached (key, value) AS
SELECT ':1:display_recipient_dict:' || r.id, (
    SELECT string_agg(u.id || email || full_name, ',' ORDER BY u.id)
    FROM zerver_subscription s JOIN zerver_userprofile u ON u.id = user_profile_id WHERE recipient_id = r.id)
    FROM zerver_recipient r
UNION ALL SELECT ':1:user_profile_by_email:' || sha1, value FROM whole, hashes WHERE of = email
UNION ALL SELECT ':1:user_profile:' || sha1 || ':' || realm_id, value FROM whole, hashes WHERE of = email
UNION ALL SELECT ':1:bot_profile:' || sha1, value FROM whole, hashes WHERE of = email AND is_bot
UNION ALL SELECT ':1:user_profile_by_id:' || id, value FROM whole
UNION ALL SELECT ':1:user_profile_by_api_key:' || api_key, value FROM whole
UNION ALL SELECT ':1:realm_user_dicts:' || realm_id, string_agg(u::text, ',' ORDER BY id) FROM zerver_userprofile u GROUP BY realm_id
UNION ALL SELECT ':1:active_user_ids:' || realm_id, string_agg(id::text, ',' ORDER BY id)
    FROM zerver_userprofile WHERE is_active GROUP BY realm_id
UNION ALL SELECT ':1:bot_dicts_in_realm:' || r.id, (
    SELECT string_agg(u::text, ',' ORDER BY id) FROM zerver_userprofile u WHERE realm_id = r.id AND is_bot)
    FROM zerver_realm r
UNION ALL SELECT ':1:stream_by_realm_and_name:' || realm_id || ':' || sha1, s::text
    FROM zerver_stream s, hashes WHERE of = lower(name)
UNION ALL SELECT ':1:realm_alert_words:' || string_id, (
    SELECT string_agg(user_profile_id || word, ',' ORDER BY id) FROM zerver_alertword WHERE realm_id = r.id)
    FROM zerver_realm r
UNION ALL SELECT ':1:realm_first_visible_message_id:' || string_id, first_visible_message_id::text FROM zerver_realm
UNION ALL SELECT ':1:message_dict:' || id, concat_ws(' ', m,
    (SELECT string_agg(r::text, ',' ORDER BY id) FROM zerver_reaction r WHERE message_id = m.id),
    (SELECT string_agg(s::text, ',' ORDER BY id) FROM zerver_submessage s WHERE message_id = m.id))
    FROM zerver_message m;
