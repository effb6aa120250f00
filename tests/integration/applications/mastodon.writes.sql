-- a filter is made, with a word
INSERT INTO custom_filters VALUES (3, 2, 'milk');
INSERT INTO custom_filter_keywords VALUES (3, 3, 'milk');

-- a word of a filter is changed
UPDATE custom_filter_keywords SET keyword = 'espresso' WHERE id = 1;

-- a word moves to a filter of another account
UPDATE custom_filter_keywords SET custom_filter_id = 2 WHERE id = 1;

-- a status is filtered no more
DELETE FROM custom_filter_statuses;

-- a filter is deleted, with its words by a cascade
DELETE FROM custom_filters WHERE id = 2;

-- a block goes both ways
-- in vain: 1
INSERT INTO blocks VALUES (2, 1, 4);

-- a mute goes one way
-- in vain: 1
INSERT INTO mutes VALUES (3, 2, 1);

-- a mute ends
-- in vain: 1
DELETE FROM mutes WHERE id = 2;

-- a follower of this server, and one of another
-- in vain: 1
INSERT INTO follows VALUES (7, 1, 2), (8, 5, 2);

-- somebody follows no more
-- in vain: 1
DELETE FROM follows WHERE id = 5;

-- somebody asks to follow, and is let in
INSERT INTO follow_requests VALUES (1, 4, 2);

-- and is let in
DELETE FROM follow_requests WHERE id = 1;
INSERT INTO follows VALUES (9, 4, 2);

-- a note about an account
UPDATE account_notes SET comment = 'a colleague';

-- an account is endorsed no more
DELETE FROM account_pins;

-- a server is blocked
INSERT INTO account_domain_blocks VALUES (3, 'example.com', 1);

-- an emoji of another server is disabled
UPDATE custom_emojis SET disabled = true WHERE id = 2;

-- an emoji of this server is renamed
UPDATE custom_emojis SET shortcode = 'Blobcat' WHERE id = 1;

-- an emoji is copied to this server
INSERT INTO custom_emojis VALUES (4, 'Tea', NULL);

-- an account tells more about itself
UPDATE accounts SET note = 'Hello' WHERE id = 1;

-- accounts are renamed
UPDATE accounts SET username = 'Ada2' WHERE id = 1;
UPDATE accounts SET username = 'Bobby' WHERE id = 3;

-- settings
UPDATE settings SET value = 'There' WHERE var = 'site_title';
INSERT INTO settings VALUES (3, 'bootstrap_timeline_accounts', '@ada');

-- a picture of the server
UPDATE site_uploads SET file_file_name = 'c.png' WHERE var = 'mascot';

-- an address is blocked
INSERT INTO ip_blocks VALUES (2, '198.51.100.0/24');

-- a server does not answer
INSERT INTO unavailable_domains VALUES (2, 'example.com');

-- a status that was boosted is edited
UPDATE statuses SET text = 'Hello, all' WHERE id = 11;

-- a status of another server gets another address
UPDATE statuses SET url = 'https://example.org/@bobby/12' WHERE id = 12;

-- a picture of a status is described
UPDATE media_attachments SET description = 'tea' WHERE id = 1;

-- a picture is taken off a status
UPDATE media_attachments SET status_id = NULL WHERE id = 2;

-- somebody is mentioned
INSERT INTO mentions VALUES (2, 11, 2);

-- a vote
UPDATE polls SET cached_tallies = '{1}' WHERE id = 1;

-- a tag
INSERT INTO statuses_tags VALUES (12, 1);

-- a card
INSERT INTO preview_cards_statuses VALUES (2, 11);

-- somebody likes a status
UPDATE status_stats SET favourites_count = 1 WHERE status_id = 15;

-- a status is boosted
INSERT INTO statuses VALUES (16, 2, NULL, NULL, '', 15);

-- a status is deleted, with its parts and boosts by a cascade
DELETE FROM statuses WHERE id = 11;

-- an account of another server is deleted, with all that it did by cascades: the hashes of its followers are searched
-- in vain: 4
DELETE FROM accounts WHERE id = 3;

-- an account of this server is deleted
-- in vain: 3
DELETE FROM accounts WHERE id = 1;
