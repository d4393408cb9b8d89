#!/usr/bin/env bash
# The AWS role of cluster.yaml's machines, made once per account:   sweeps/clusters/aws_role.sh BUCKET
#
# The head may start and end machines, hand them this same role, and look up their image; every machine may use the bucket. Needs
# the aws command and the right to make roles. To undo it, delete the instance profile and the role llmft-ray in the IAM console.
set -euo pipefail

bucket=${1:?the name of the bucket for results is missing}
role=llmft-ray
account=$(aws sts get-caller-identity --query Account --output text)

aws iam create-role --role-name "$role" --assume-role-policy-document '{
  "Version": "2012-10-17",
  "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}]
}'
aws iam attach-role-policy --role-name "$role" --policy-arn arn:aws:iam::aws:policy/AmazonEC2FullAccess
aws iam put-role-policy --role-name "$role" --policy-name llmft --policy-document '{
  "Version": "2012-10-17",
  "Statement": [
    {"Effect": "Allow", "Action": "iam:PassRole", "Resource": "arn:aws:iam::'"$account"':role/'"$role"'"},
    {"Effect": "Allow", "Action": "ssm:GetParameters", "Resource": "arn:aws:ssm:*::parameter/aws/service/deeplearning/ami/*"},
    {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetBucketLocation"], "Resource": "arn:aws:s3:::'"$bucket"'"},
    {"Effect": "Allow", "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"], "Resource": "arn:aws:s3:::'"$bucket"'/*"}
  ]
}'
aws iam create-instance-profile --instance-profile-name "$role"
aws iam add-role-to-instance-profile --instance-profile-name "$role" --role-name "$role"
echo "made: role and instance profile $role, for the bucket $bucket"
