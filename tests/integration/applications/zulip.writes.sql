-- a user is renamed
UPDATE zerver_userprofile SET full_name = 'Ada L.' WHERE id = 1;

-- a user gets another address
UPDATE zerver_userprofile SET email = 'eva@example.com' WHERE id = 3;

-- a user gets another key
UPDATE zerver_userprofile SET api_key = 'key-5' WHERE id = 1;

-- a user is deactivated
UPDATE zerver_userprofile SET is_active = false WHERE id = 3;

-- a bot is made, with its subscription
INSERT INTO zerver_userprofile VALUES (5, 1, 'bot2@example.org', 'Bot', 'key-6', true, true);
INSERT INTO zerver_subscription VALUES (5, 5, 2);

-- a user leaves a conversation
DELETE FROM zerver_subscription WHERE id = 4;

-- a stream is renamed, but for its case
UPDATE zerver_stream SET name = 'TEA' WHERE id = 1;

-- a stream is renamed
UPDATE zerver_stream SET name = 'Tea Time' WHERE id = 1;

-- an alert word
INSERT INTO zerver_alertword VALUES (3, 1, 3, 'milk');

-- a realm is renamed
-- in vain: 2
UPDATE zerver_realm SET name = 'The lab' WHERE id = 1;

-- a realm moves to another address
UPDATE zerver_realm SET string_id = 'factory' WHERE id = 2;

-- a message is edited, and one gets a reaction
UPDATE zerver_message SET content = 'Coffee?' WHERE id = 1;
DELETE FROM zerver_reaction WHERE id = 1;

-- a vote in a poll
INSERT INTO zerver_submessage VALUES (1, 2, '1');

-- a user is deleted, with subscriptions and alert words
DELETE FROM zerver_subscription WHERE user_profile_id = 1;
DELETE FROM zerver_alertword WHERE user_profile_id = 1;
DELETE FROM zerver_userprofile WHERE id = 1;

-- a realm is deleted with all that belongs to it
DELETE FROM zerver_stream WHERE realm_id = 2;
DELETE FROM zerver_alertword WHERE realm_id = 2;
DELETE FROM zerver_userprofile WHERE realm_id = 2;
DELETE FROM zerver_realm WHERE id = 2;
